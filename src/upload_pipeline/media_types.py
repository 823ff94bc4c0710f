"""What a file is, judged by its first bytes; the name only breaks ties between kinds of text.

Nothing here reads a file: callers pass the head they have. Whether a PDF or DOCX opens, and whether it is
encrypted, is for the parser's `inspect`, which runs in a process of its own.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Iterable, Iterator

from upload_pipeline.errors import ErrorCode, PipelineError

PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
HTML = "text/html"
MARKDOWN = "text/markdown"
PLAIN = "text/plain"

MEDIA_TYPES: tuple[str, ...] = (PDF, DOCX, HTML, MARKDOWN, PLAIN)
"""The media types that the document pipeline takes."""

HEAD_BYTES = 65536
"""How much of a file's beginning detection wants; shorter is fine when the file is shorter."""

_PDF_HEADER_WITHIN = 1024
"""Readers accept the header anywhere in the first 1,024 bytes (PDF 1.7 reference, appendix H.3, note 13)."""

_EXTENSIONS: dict[str, str] = {
    "pdf": PDF,
    "docx": DOCX,
    "html": HTML,
    "htm": HTML,
    "xhtml": HTML,
    "md": MARKDOWN,
    "markdown": MARKDOWN,
    "mkd": MARKDOWN,
    "txt": PLAIN,
    "text": PLAIN,
    "log": PLAIN,
}

_TEXT_TYPES = frozenset({HTML, MARKDOWN, PLAIN})

# Kinds that we know by their first bytes and do not take: (offset, bytes, kind).
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG image"),
    (0, b"\xff\xd8\xff", "JPEG image"),
    (0, b"GIF87a", "GIF image"),
    (0, b"GIF89a", "GIF image"),
    (8, b"WEBP", "WebP image"),
    (0, b"II*\x00", "TIFF image"),
    (0, b"MM\x00*", "TIFF image"),
    (4, b"ftypheic", "HEIC image"),
    (4, b"ftypmif1", "HEIC image"),
    (4, b"ftypavif", "AVIF image"),
    (4, b"ftyp", "MP4 video"),
    (0, b"\x1aE\xdf\xa3", "Matroska video"),
    (0, b"ID3", "MP3 audio"),
    (8, b"WAVE", "WAV audio"),
    (0, b"OggS", "Ogg audio"),
    (0, b"\x1f\x8b", "gzip archive"),
    (0, b"BZh", "bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "xz archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-Zip archive"),
    (0, b"Rar!\x1a\x07", "RAR archive"),
    (257, b"ustar", "tar archive"),
    (0, b"\x7fELF", "ELF program"),
    (0, b"\xcf\xfa\xed\xfe", "Mach-O program"),
    (0, b"{\\rtf", "RTF document"),
    (0, b"%!PS", "PostScript document"),
    (0, b"SQLite format 3\x00", "SQLite database"),
)

# Extensions of kinds that we do not take; content that contradicts them is a mismatch all the same.
_FOREIGN_EXTENSIONS: dict[str, str] = {
    "png": "PNG image",
    "jpg": "JPEG image",
    "jpeg": "JPEG image",
    "gif": "GIF image",
    "webp": "WebP image",
    "tif": "TIFF image",
    "tiff": "TIFF image",
    "heic": "HEIC image",
    "xlsx": "XLSX workbook",
    "pptx": "PPTX presentation",
    "odt": "OpenDocument file",
    "epub": "EPUB book",
    "zip": "ZIP archive",
    "doc": "legacy Office file",
    "xls": "legacy Office file",
    "ppt": "legacy Office file",
    "rtf": "RTF document",
    "exe": "Windows program",
}

# Other names that senders give to the types above.
_ALIASES: dict[str, str] = {
    "application/x-pdf": PDF,
    "application/xhtml+xml": HTML,
    "text/x-markdown": MARKDOWN,
}

# What a sender says who does not know.
_UNTOLD = frozenset({"", "application/octet-stream", "binary/octet-stream"})

_OLE_MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
# The stream that holds an encrypted OOXML package ([MS-OFFCRYPTO], section 1.3.2), as directories spell it.
ENCRYPTED_PACKAGE_MARK = "EncryptedPackage".encode("utf-16-le")

_BOMS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_ALLOWED_CONTROLS = frozenset(b"\t\n\v\f\r\x1a\x1b")
_CONTROL_SHARE = 200
"""One control character in this many bytes is still text: stray ones occur, random bytes hold one in ten."""

_BEFORE_HTML = re.compile(r"(?:\s+|<!--.*?-->|<\?xml\b[^>]*\?>)*", re.DOTALL)
_HTML_START = re.compile(
    r"<(?:!doctype\s+html|(?:html|head|body|title|meta|link|base|script|style|main|article|section|header|nav"
    r"|div|p|h[1-6]|table|ul|ol|dl|pre|blockquote|span|center|font|a)(?=[\s/>]))",
    re.IGNORECASE,
)


def detect_media_type(filename: str, head: bytes, *, size: int) -> str:
    """Says what a file is.

    The content decides. An extension that says otherwise is an error rather than a hint; a missing or
    unknown one is no matter. Between HTML, Markdown and plain text a known extension decides, since each is
    also the others.

    Args:
        filename: the name that the user gave, with or without directories.
        head: the file's first bytes, `HEAD_BYTES` of them or the whole file.
        size: the file's size in bytes.

    Returns:
        One of `MEDIA_TYPES`. A DOCX whose head shows only a ZIP or an OLE container is called DOCX on the
        word of its name; opening it settles the matter.

    Raises:
        PipelineError: `EMPTY_FILE`, `UNSUPPORTED_TYPE` (a kind that we know and do not take), `TYPE_MISMATCH`
            (content and extension contradict each other) or `ENCRYPTED` (a password-protected Office file).
    """
    if size <= 0 or not head:
        raise PipelineError(
            ErrorCode.EMPTY_FILE, f"{filename!r} is empty. Send a file with content.", {"filename": filename}
        )
    named = _EXTENSIONS.get(_extension(filename))
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return media_type_of_zip(filename, _names_in_head(head), complete=len(head) >= size)
    if head.startswith(_OLE_MAGIC):
        return _of_ole(filename, head, named)
    if head.startswith(b"%PDF-"):
        return _agreed(filename, PDF, named)
    for offset, signature, kind in _SIGNATURES:
        if head.startswith(signature, offset):
            raise _refusal(filename, kind)
    if head.startswith(b"MZ") and b"\x00" in head:
        raise _refusal(filename, "Windows program")
    text = _as_text(head, whole=len(head) >= size)
    if b"%PDF-" in head[:_PDF_HEADER_WITHIN] and not (text is not None and named in _TEXT_TYPES):
        return _agreed(filename, PDF, named)
    if text is None:
        raise _refusal(filename, "unknown binary data")
    if named in _TEXT_TYPES:
        return named
    return _agreed(filename, HTML if looks_like_html(text) else PLAIN, named)


def declared_media_type(filename: str, declared: str) -> str:
    """Says what a file should be by its name and by what its sender calls it, before a byte of it is there.

    Args:
        filename: the name that the user gave; its extension decides between kinds of text.
        declared: a media type as in a `Content-Type` header; empty or `application/octet-stream` says nothing.

    Returns:
        One of `MEDIA_TYPES`.

    Raises:
        PipelineError: `TYPE_MISMATCH` where name and declaration contradict each other; `UNSUPPORTED_TYPE` where
            neither names a type that is taken.
    """
    mime = declared.partition(";")[0].strip().lower()
    extension = _extension(filename)
    named, foreign = _EXTENSIONS.get(extension), _FOREIGN_EXTENSIONS.get(extension)
    said = _ALIASES.get(mime, mime if mime in MEDIA_TYPES else PLAIN if mime.startswith("text/") else None)
    if named is None and foreign is None and said is not None:
        return said
    if named is not None and (mime in _UNTOLD or said == named or {said, named} <= _TEXT_TYPES):
        return named
    if (named is not None and mime not in _UNTOLD) or (foreign is not None and said is not None):
        raise PipelineError(
            ErrorCode.TYPE_MISMATCH,
            f"{filename!r} is named as {_spoken(named) if named else foreign} but declared as {mime}. Declare what it "
            "is, or rename it.",
            {"filename": filename, "expected": named or foreign, "declared": mime},
        )
    raise PipelineError(
        ErrorCode.UNSUPPORTED_TYPE,
        f"{filename!r} is of a kind that is not taken ({foreign or mime or 'no type is named'}). "
        f"Send a file of one of these: {spoken_types(MEDIA_TYPES)}.",
        {"filename": filename, "declared": mime, "taken": list(MEDIA_TYPES)},
    )


def media_type_of_zip(filename: str, names: Iterable[str], *, complete: bool = True) -> str:
    """Says what a ZIP container is by the names of its members.

    Args:
        filename: the name that the user gave.
        names: the members' names; all of them, or those that the head shows.
        complete: whether `names` are all; if not, a name in `.docx` is believed unless another kind shows.

    Raises:
        PipelineError: `UNSUPPORTED_TYPE` or `TYPE_MISMATCH`, as in `detect_media_type`.
    """
    named = _EXTENSIONS.get(_extension(filename))
    members = tuple(names)
    if any(name.startswith("word/") for name in members):
        return _agreed(filename, DOCX, named)
    for prefix, kind in (("xl/", "XLSX workbook"), ("ppt/", "PPTX presentation")):
        if any(name.startswith(prefix) for name in members):
            raise _refusal(filename, kind)
    if any(name.startswith("META-INF/container.xml") for name in members):
        raise _refusal(filename, "EPUB book")
    if "mimetype" in members:
        raise _refusal(filename, "OpenDocument file")
    if not complete and named == DOCX:
        return DOCX
    raise _refusal(filename, "ZIP archive")


def byte_order_mark(head: bytes) -> str | None:
    """Names the codec that a byte order mark at the start of `head` asks for, if there is one."""
    return next((codec for mark, codec in _BOMS if head.startswith(mark)), None)


def looks_like_html(text: str) -> bool:
    """Whether text, past white space, comments and an XML declaration, begins with a tag of HTML."""
    start = _BEFORE_HTML.match(text)
    return _HTML_START.match(text, start.end() if start else 0) is not None


def spoken_types(media_types: Iterable[str]) -> str:
    """Names media types for a message, as in `PDF, DOCX`."""
    return ", ".join(_spoken(media_type) for media_type in MEDIA_TYPES if media_type in set(media_types))


def _extension(filename: str) -> str:
    name = re.split(r"[/\\]", filename)[-1]
    stem, dot, extension = name.rpartition(".")
    return extension.strip().lower() if dot and stem else ""


def _agreed(filename: str, found: str, named: str | None) -> str:
    foreign = _FOREIGN_EXTENSIONS.get(_extension(filename))
    expected = named or foreign
    if expected is not None and expected != found:
        raise _mismatch(filename, _spoken(expected), _spoken(found))
    return found


def _refusal(filename: str, kind: str) -> PipelineError:
    extension = _extension(filename)
    named = _EXTENSIONS.get(extension)
    expected = _spoken(named) if named else _FOREIGN_EXTENSIONS.get(extension)
    # A ZIP or OLE container under the name of another format in such a container is no contradiction.
    if expected is not None and expected != kind and kind not in ("ZIP archive", "legacy Office file"):
        return _mismatch(filename, expected, kind)
    if named is not None:
        return _mismatch(filename, _spoken(named), kind)
    return PipelineError(
        ErrorCode.UNSUPPORTED_TYPE,
        f"{filename!r} is of a kind that is not taken ({kind}). Send a PDF, DOCX, HTML, Markdown or text file.",
        {"filename": filename, "kind": kind},
    )


def _mismatch(filename: str, expected: str, found: str) -> PipelineError:
    return PipelineError(
        ErrorCode.TYPE_MISMATCH,
        f"{filename!r} is named as {expected} but its content is {found}. Rename it to what it is, or send"
        " the file that was meant.",
        {"filename": filename, "expected": expected, "found": found},
    )


def _spoken(media_type: str) -> str:
    return {PDF: "PDF", DOCX: "DOCX", HTML: "HTML", MARKDOWN: "Markdown", PLAIN: "text"}.get(media_type, media_type)


def _of_ole(filename: str, head: bytes, named: str | None) -> str:
    if ENCRYPTED_PACKAGE_MARK in head:
        raise PipelineError(
            ErrorCode.ENCRYPTED,
            f"{filename!r} is protected by a password. Remove the protection and send it again.",
            {"filename": filename},
        )
    if named == DOCX:
        return DOCX  # the container's directory may stand anywhere in the file: opening it tells
    raise _refusal(filename, "legacy Office file")


def _names_in_head(head: bytes) -> Iterator[str]:
    """Reads member names off the local headers (PKWARE APPNOTE, section 4.3.7) that a head shows."""
    at = head.find(b"PK\x03\x04")
    while at >= 0 and at + 30 <= len(head):
        (length,) = struct.unpack_from("<H", head, at + 26)
        yield head[at + 30 : at + 30 + length].decode("utf-8", "replace")
        at = head.find(b"PK\x03\x04", at + 30)


def _as_text(head: bytes, *, whole: bool) -> str | None:
    """Decodes a head leniently for looking at; None where it is not text."""
    mark = byte_order_mark(head)
    if mark is not None:
        try:
            text = codecs.getincrementaldecoder(mark)().decode(head, final=whole)
        except UnicodeError:
            return None
        controls = sum(text.count(chr(code)) for code in range(32) if code not in _ALLOWED_CONTROLS)
        return None if "\x00" in text or controls * _CONTROL_SHARE > len(text) else text
    if b"\x00" in head:
        return None
    controls = sum(head.count(code) for code in range(32) if code not in _ALLOWED_CONTROLS)
    if controls * _CONTROL_SHARE > len(head):
        return None
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
    except UnicodeDecodeError:
        return head.decode("latin-1")
