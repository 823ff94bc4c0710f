"""DOCX to Markdown: mammoth makes HTML of it, our HTML converter the rest."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any
from xml.parsers import expat

import mammoth

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import ENCRYPTED_PACKAGE_MARK, media_type_of_zip
from upload_pipeline.providers.local.html_markdown import fragment_markdown
from upload_pipeline.providers.parsing import ParsedMarkdown

_MOST_MEMBERS = 20_000
_MOST_XML_BYTES = 256 * 1024 * 1024
_MOST_RATIO = 200
"""XML that people write shrinks 10 to 30 times; what shrinks more, and is large, was made to."""
_RATIO_COUNTS_FROM = 8 * 1024 * 1024
_OLE_MAGIC = b"\xd0\xcf\x11\xe0"
_ENCRYPTED_MEMBER = 0x1
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What a package may be packed with (ECMA-376 part 2, annex B); other packings only widen what can go wrong."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError)
_MAIN_PART = "word/document.xml"

_STYLES = """
p[style-name='Title'] => h1:fresh
p[style-name='Subtitle'] => p:fresh
p[style-name='Heading 7'] => h6:fresh
p[style-name='Heading 8'] => h6:fresh
p[style-name='Heading 9'] => h6:fresh
p[style-name='Code'] => pre:separator('\\n')
p[style-name='Source Code'] => pre:separator('\\n')
p[style-name='HTML Preformatted'] => pre:separator('\\n')
p[style-name='Preformatted Text'] => pre:separator('\\n')
p[style-name='Quote'] => blockquote > p:fresh
p[style-name='Intense Quote'] => blockquote > p:fresh
r[style-name='Source Text'] => code
r[style-name='HTML Code'] => code
r[style-name='Verbatim Char'] => code
"""


def docx_markdown(path: Path) -> ParsedMarkdown:
    """Turns a DOCX into Markdown; pictures become their alternative text, comments are left out.

    Raises:
        PipelineError: as `inspect_docx`, and `PARSE_FAILED` where mammoth gives up.
    """
    content = path.read_bytes()
    _check(content)
    try:
        result = mammoth.convert_to_html(
            io.BytesIO(content),
            style_map=_STYLES,
            include_embedded_style_map=False,
            convert_image=mammoth.images.img_element(_no_picture),
        )
    except (*_DAMAGE, KeyError, AttributeError, expat.ExpatError) as error:
        raise PipelineError(
            ErrorCode.PARSE_FAILED,
            f"The DOCX could not be read ({type(error).__name__}: {error}). Save it anew in Word or LibreOffice.",
        ) from error
    problems = sorted({message.message for message in result.messages if message.type == "error"})
    return ParsedMarkdown(fragment_markdown(result.value), None, tuple(problems[:10]))


def inspect_docx(path: Path) -> None:
    """Opens a DOCX: a sound container of bearable size, with a main part that is XML.

    Raises:
        PipelineError: `ENCRYPTED`, `CORRUPT_FILE`, `TYPE_MISMATCH` or `UNSUPPORTED_TYPE`.
    """
    _check(path.read_bytes())


def _check(content: bytes) -> None:
    if content.startswith(_OLE_MAGIC):
        if ENCRYPTED_PACKAGE_MARK in content:
            raise _encrypted()
        raise PipelineError(
            ErrorCode.TYPE_MISMATCH, "The file is named as DOCX but is of an older Office format. Save it as DOCX."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as container:
            members = container.infolist()
            media_type_of_zip("document.docx", [member.filename for member in members])
            _check_sizes(members)
            _check_main_part(container)
    except _DAMAGE as error:
        raise _corrupt(f"its container is damaged: {error}") from error


def _check_sizes(members: list[zipfile.ZipInfo]) -> None:
    if len(members) > _MOST_MEMBERS:
        raise _corrupt(f"it has {len(members):,} members")
    parts = [member for member in members if member.filename.lower().endswith((".xml", ".rels"))]
    if any(member.flag_bits & _ENCRYPTED_MEMBER for member in parts):
        raise _encrypted()
    if any(member.compress_type not in _PACKINGS for member in parts):
        raise _corrupt("its parts are packed in a way that the format does not know")
    total = sum(member.file_size for member in parts)
    if total > _MOST_XML_BYTES:
        raise _corrupt(f"it unpacks to {total:,} bytes of XML")
    for part in parts:
        if part.file_size > _RATIO_COUNTS_FROM and part.file_size > _MOST_RATIO * max(1, part.compress_size):
            raise _corrupt(f"{part.filename} unpacks {part.file_size // max(1, part.compress_size):,} times")


def _check_main_part(container: zipfile.ZipFile) -> None:
    names = set(container.namelist())
    if _MAIN_PART not in names:
        return  # named otherwise, which mammoth finds by the relationships, or missing, which it says
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_dtd
    try:
        with container.open(_MAIN_PART) as part:
            while piece := part.read(1 << 20):
                parser.Parse(piece, False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise _corrupt(f"{_MAIN_PART} is not well-formed: {error}") from error


def _refuse_dtd(*_: Any) -> None:
    # Office Open XML allows none (ECMA-376 part 2, section 8.1.4); in files made to do harm they are bombs.
    raise _corrupt(f"{_MAIN_PART} declares a DTD")


def _no_picture(_: Any) -> dict[str, str]:
    return {}


def _encrypted() -> PipelineError:
    return PipelineError(
        ErrorCode.ENCRYPTED, "The DOCX is protected by a password. Remove the protection and send it again."
    )


def _corrupt(reason: str) -> PipelineError:
    return PipelineError(
        ErrorCode.CORRUPT_FILE,
        f"The DOCX cannot be opened: {reason}. Save it anew in Word or LibreOffice and send that.",
    )
