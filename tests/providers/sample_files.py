"""Files that the parser's tests make for themselves, and looks at the processes that read them."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
FONT = b"<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"


def pdf_of_objects(objects: Sequence[bytes], *, trailer: bytes = b"") -> bytes:
    """A PDF of the given objects, numbered from 1, the first being the catalog."""
    out = b"%PDF-1.7\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    count = len(objects) + 1
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % count + table
    return out + b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (count, trailer, start)


def pdf_stream(content: bytes, extra: bytes = b"", filters: bytes = b"/FlateDecode") -> bytes:
    head = b"<< /Length %d /Filter %s %s >>\nstream\n" % (len(content), filters, extra)
    return head + content + b"\nendstream"


def pdf_of_pages(pages: Sequence[str], *, trailer: bytes = b"") -> bytes:
    """A PDF with one line of text on each page; an empty string is a blank page."""
    kids = b" ".join(b"%d 0 R" % (3 + 2 * number) for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [" + kids + b"] /Count %d >>" % len(pages),
    ]
    for number, text in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources "
            + FONT
            + b" /Contents %d 0 R >>" % (4 + 2 * number)
        )
        shown = text.encode("latin-1").replace(b"(", b"\\(").replace(b")", b"\\)")
        objects.append(pdf_stream(zlib.compress(b"BT /F1 12 Tf 72 400 Td (" + shown + b") Tj ET" if text else b"")))
    return pdf_of_objects(objects, trailer=trailer)


def pdf_with_content(content: bytes, filters: bytes = b"/FlateDecode") -> bytes:
    """A PDF of one page whose content stream is given, already filtered."""
    return pdf_of_objects(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources " + FONT + b" /Contents 4 0 R >>",
            pdf_stream(content, filters=filters),
        ]
    )


@cache
def repeated(text: bytes, total: int) -> bytes:
    """`text` over and over to `total` bytes, deflated without ever holding them."""
    packer = zlib.compressobj(9)
    block = text * (1 + (1 << 20) // len(text))
    out = b"".join(packer.compress(block) for _ in range(total // len(block)))
    return out + packer.flush()


def pdf_of_nested_forms(depth: int) -> bytes:
    """A PDF whose page draws a form twice, which draws a form twice, and so on: 2**depth drawings."""
    twice = zlib.compress(b"/X Do /X Do")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        (
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /XObject << /X 5 0 R >> >>"
            b" /Contents 4 0 R >>"
        ),
        pdf_stream(twice),
    ]
    for level in range(depth):
        last = level == depth - 1
        resources = FONT if last else b"<< /XObject << /X %d 0 R >> >>" % (6 + level)
        form = b"/Type /XObject /Subtype /Form /BBox [0 0 612 792] /Resources " + resources
        objects.append(pdf_stream(zlib.compress(b"BT /F1 12 Tf (x) Tj ET") if last else twice, form))
    return pdf_of_objects(objects)


def encrypted_pdf() -> bytes:
    """A PDF under the standard security handler that the empty password does not open."""
    handler = b"/Filter /Standard /V 1 /R 2 /P -4 /O <" + b"41" * 32 + b"> /U <" + b"42" * 32 + b">"
    return pdf_of_pages(["secret"], trailer=b"/Encrypt << " + handler + b" >> /ID [<00> <00>]")


def docx_of(body: str, extra: dict[str, str | bytes] | None = None) -> bytes:
    """A DOCX with the given content of `w:body`."""
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/></Types>',
        "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/'
        'officeDocument" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>',
    }
    parts |= extra or {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as container:
        for name, content in parts.items():
            container.writestr(name, content)
    return buffer.getvalue()


def paragraph(text: str, style: str = "") -> str:
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f'<w:p>{properties}<w:r><w:t xml:space="preserve">{escape(text)}</w:t></w:r></w:p>'


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and merely waits to be collected does not."""
    return _stat(pid)[0] not in ("Z", "X", "")


def parent_of(pid: int) -> int:
    """The parent of a process, 0 where there is none."""
    return int(_stat(pid)[1])


def fork_servers_of(owner: int) -> list[int]:
    """The parser's servers that `owner` started."""
    return [pid for pid in _processes() if parent_of(pid) == owner and "fork_server" in _command(pid)]


def readers_of(owner: int) -> list[int]:
    """The processes that read files for `owner`."""
    servers = fork_servers_of(owner)
    return [pid for pid in _processes() if parent_of(pid) in servers]


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> tuple[str, str]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", "0"
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, parent


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
