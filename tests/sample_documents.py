"""Documents made for tests and samples: PDF, DOCX, text, Markdown and HTML, with nothing but the standard library.

The same arguments give the same bytes, on every machine: no clock, no compression, no random names.
"""

from __future__ import annotations

import html
import io
import random
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

Kind = Literal["pdf", "docx", "txt", "md", "html"]
KINDS: tuple[Kind, ...] = ("pdf", "docx", "txt", "md", "html")


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of level 1 to 3."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """A list, numbered or not."""

    items: tuple[str, ...]
    numbered: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first row is its header, all rows are equally long."""

    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class PageBreak:
    """The next block begins a page."""


Block = Heading | Paragraph | Items | Table | PageBreak

# what the tests ask for

_FIRST = ("amber", "brisk", "cobalt", "dusty", "eager", "frosted", "gilded", "hollow", "ivory", "jagged", "lilac")
_SECOND = ("badger", "curlew", "dolphin", "ermine", "falcon", "gecko", "heron", "ibis", "jackal", "kestrel", "lynx")
_THIRD = ("anvil", "beacon", "compass", "drawbridge", "easel", "furnace", "gazebo", "harpsichord", "inkwell", "kettle")

_SUBJECTS = (
    "Roof survey", "Burst pipe", "Kitchen fire", "Stolen bicycle", "Fallen oak", "Broken windscreen", "Sewer backup",
    "Lightning strike", "Flooded cellar", "Cracked chimney", "Lost ring", "Frozen radiator", "Collapsed fence",
    "Smoke in the attic", "Vandalised shop front", "Leaking water heater",
)  # fmt: skip
_PLACES = ("Port Elder", "Millrace Lane", "Quay Street", "Larkfield", "Saltmarsh Road", "Upper Wharf", "Gorse Hill")
_PEOPLE = ("Ines Varga", "Tobias Okafor", "Marta Lindqvist", "Piet Aldous", "Yuki Brandt", "Samir Holloway")
_SENTENCES = (
    "{person} reported the loss at {place} on day {day} of the policy period.",
    "The deductible of ${amount} is subtracted once, before the limit is applied.",
    "Repair was estimated at ${amount} by two contractors who saw the damage within {day} days.",
    "Photographs {day} to {amount} show the room before anything was moved.",
    "The adjuster measured {day} percent moisture near {place} and asked for drying equipment.",
    "Nobody was hurt, and the house at {place} could be lived in throughout.",
    "A reserve of ${amount} was set and looked at again after {day} days.",
    "{person} kept the failed part, tagged it and sent it to the laboratory.",
    "The neighbour of {person} heard the noise shortly after midnight.",
    "Payment of ${amount} went to the insured and the mortgagee as their interests appear.",
    "Wear and rot are excluded; the sudden part of the damage is not.",
    "Notice reached the office in {place} within {day} days, as the conditions ask.",
)


def phrase(seed: int) -> str:
    """The phrase that each document of this seed holds once, unbroken, and no document of another seed.

    It stands on the last page.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    first, rest = _FIRST[seed % len(_FIRST)], seed // len(_FIRST)
    second, rest = _SECOND[rest % len(_SECOND)], rest // len(_SECOND)
    return f"{first} {second} {_THIRD[rest % len(_THIRD)]} {seed:06d}"


def make_document(kind: Kind, seed: int, pages: int = 2) -> bytes:
    """A document with headings, paragraphs, a list and a table, about 1,300 characters a page.

    Args:
        kind: its format.
        seed: 0 or more; documents of different seeds differ in content, and each holds its `phrase(seed)`.
        pages: pages of a PDF; in the other formats the amount of text. 1 or more.
    """
    if pages < 1:
        raise ValueError(f"pages must be 1 or more, not {pages}")
    writers: dict[Kind, Callable[[Sequence[Block]], bytes]] = {
        "pdf": write_pdf,
        "docx": write_docx,
        "txt": _write_text,
        "md": _write_markdown,
        "html": _write_html,
    }
    return writers[kind](_content(seed, pages))


def _content(seed: int, pages: int) -> list[Block]:
    secret = phrase(seed)
    chance = random.Random(seed)
    blocks: list[Block] = [Heading(1, f"Claim file {seed:06d}")]
    for page in range(1, pages + 1):
        if page > 1:
            blocks.append(PageBreak())
        blocks.append(Heading(2, f"{chance.choice(_SUBJECTS)}, part {page}"))
        blocks += [Paragraph(_sentences(chance, 4)) for _ in range(3)]
        blocks.append(Items(tuple(_sentences(chance, 1) for _ in range(3)), numbered=chance.random() < 0.5))
        costs = [(chance.choice(_SUBJECTS), f"${chance.randint(100, 9_999):,}") for _ in range(3)]
        blocks.append(Table((("Item", "Cost"), *costs)))
    blocks.append(Paragraph(f"File mark: {secret}."))
    return blocks


def _sentences(chance: random.Random, count: int) -> str:
    return " ".join(
        sentence.format(
            person=chance.choice(_PEOPLE),
            place=chance.choice(_PLACES),
            day=chance.randint(2, 99),
            amount=chance.randint(100, 9_999),
        )
        for sentence in chance.sample(_SENTENCES, count)
    )


def _write_text(blocks: Sequence[Block]) -> bytes:
    parts: list[str] = []
    for block in blocks:
        match block:
            case Heading(_, text):
                parts.append(text.upper())
            case Paragraph(text):
                parts.append(text)
            case Items(items):
                parts.append("\n".join(f"  - {item}" for item in items))
            case Table(rows):
                parts.append("\n".join("  " + ": ".join(row) for row in rows[1:]))
            case PageBreak():
                pass
    return ("\n\n".join(parts) + "\n").encode()


def _write_markdown(blocks: Sequence[Block]) -> bytes:
    parts: list[str] = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append("#" * level + " " + text)
            case Paragraph(text):
                parts.append(text)
            case Items(items, numbered):
                parts.append("\n".join(f"{n}. {item}" if numbered else f"- {item}" for n, item in enumerate(items, 1)))
            case Table(rows):
                lines = ["| " + " | ".join(row) + " |" for row in rows]
                parts.append("\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]]))
            case PageBreak():
                pass
    return ("\n\n".join(parts) + "\n").encode()


def _write_html(blocks: Sequence[Block]) -> bytes:
    body: list[str] = []
    for block in blocks:
        match block:
            case Heading(level, text):
                body.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Paragraph(text):
                body.append(f"<p>{html.escape(text)}</p>")
            case Items(items, numbered):
                tag = "ol" if numbered else "ul"
                body.append(f"<{tag}>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + f"</{tag}>")
            case Table(rows):
                lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
                lines[0] = lines[0].replace("td>", "th>")
                body.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
            case PageBreak():
                pass
    head = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Claim file</title></head><body>\n'
    return (head + "\n".join(body) + "\n</body></html>\n").encode()


# DOCX: Office Open XML (ECMA-376), the least that Word, mammoth and python-docx open

_W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_WORD_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml"
_BULLET, _NUMBER = 1, 2


def write_docx(blocks: Sequence[Block]) -> bytes:
    """A Word file with heading styles, real lists and tables; zip entries are stored, dated 1980."""
    lists = sum(isinstance(block, Items) and block.numbered for block in blocks)
    files = {
        "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/>'
        + "".join(
            f'<Override PartName="/word/{part}.xml" ContentType="{_WORD_TYPE}.{kind}+xml"/>'
            for part, kind in (("document", "document.main"), ("styles", "styles"), ("numbering", "numbering"))
        )
        + "</Types>",
        "_rels/.rels": _relations({"officeDocument": "word/document.xml"}),
        "word/_rels/document.xml.rels": _relations({"styles": "styles.xml", "numbering": "numbering.xml"}),
        "word/document.xml": f"<w:document {_W}><w:body>{_docx_body(blocks)}</w:body></w:document>",
        "word/styles.xml": f"<w:styles {_W}>{_docx_styles()}</w:styles>",
        "word/numbering.xml": f"<w:numbering {_W}>{_docx_numbering(lists)}</w:numbering>",
    }
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # else it tells which system wrote it
            archive.writestr(entry, _XML + content)
    return target.getvalue()


def _relations(targets: dict[str, str]) -> str:
    rows = "".join(
        f'<Relationship Id="rId{n}" Type="{_OFFICE}/{kind}" Target="{target}"/>'
        for n, (kind, target) in enumerate(targets.items(), 1)
    )
    return f'<Relationships xmlns="{_PACKAGE}/relationships">{rows}</Relationships>'


def _docx_styles() -> str:
    styles = '<w:style w:type="paragraph" w:default="1" w:styleId="Normal"><w:name w:val="Normal"/></w:style>'
    for level, half_points in ((1, 36), (2, 28), (3, 24)):
        styles += (
            f'<w:style w:type="paragraph" w:styleId="Heading{level}"><w:name w:val="heading {level}"/>'
            f'<w:basedOn w:val="Normal"/><w:pPr><w:outlineLvl w:val="{level - 1}"/></w:pPr>'
            f'<w:rPr><w:b/><w:sz w:val="{half_points}"/></w:rPr></w:style>'
        )
    return styles


def _docx_numbering(numbered_lists: int) -> str:
    abstract = "".join(
        f'<w:abstractNum w:abstractNumId="{number}"><w:lvl w:ilvl="0"><w:start w:val="1"/>'
        f'<w:numFmt w:val="{form}"/><w:lvlText w:val="{text}"/></w:lvl></w:abstractNum>'
        for number, form, text in ((_BULLET, "bullet", "\u2022"), (_NUMBER, "decimal", "%1."))
    )
    # A number of its own for each list, so that each starts at 1.
    instances = [_BULLET] + [_NUMBER] * numbered_lists
    return abstract + "".join(
        f'<w:num w:numId="{number}"><w:abstractNumId w:val="{kind}"/><w:lvlOverride w:ilvl="0">'
        f'<w:startOverride w:val="1"/></w:lvlOverride></w:num>'
        for number, kind in enumerate(instances, 1)
    )


def _docx_body(blocks: Sequence[Block]) -> str:
    body: list[str] = []
    numbered = _BULLET
    for block in blocks:
        match block:
            case Heading(level, text):
                body.append(_docx_paragraph(text, f'<w:pStyle w:val="Heading{level}"/>'))
            case Paragraph(text):
                body.append(_docx_paragraph(text))
            case Items(items, is_numbered):
                numbered += is_numbered
                number = numbered if is_numbered else _BULLET
                place = f'<w:numPr><w:ilvl w:val="0"/><w:numId w:val="{number}"/></w:numPr>'
                body += [_docx_paragraph(item, place) for item in items]
            case Table(rows):
                body.append(_docx_table(rows))
            case PageBreak():
                body.append('<w:p><w:r><w:br w:type="page"/></w:r></w:p>')
    return "".join(body)


def _docx_paragraph(text: str, properties: str = "") -> str:
    return f'<w:p><w:pPr>{properties}</w:pPr><w:r><w:t xml:space="preserve">{escape(text)}</w:t></w:r></w:p>'


def _docx_table(rows: Iterable[Sequence[str]]) -> str:
    lines: list[str] = []
    columns = 0
    for number, row in enumerate(rows):
        columns = len(row)
        header = "<w:trPr><w:tblHeader/></w:trPr>" if number == 0 else ""
        cells = "".join(f"<w:tc>{_docx_paragraph(cell)}</w:tc>" for cell in row)
        lines.append(f"<w:tr>{header}{cells}</w:tr>")
    grid = '<w:gridCol w:w="2400"/>' * columns
    edges = "".join(
        f'<w:{side} w:val="single" w:sz="4"/>' for side in ("top", "left", "bottom", "right", "insideH", "insideV")
    )
    look = f"<w:tblPr><w:tblBorders>{edges}</w:tblBorders></w:tblPr>"
    return f"<w:tbl>{look}<w:tblGrid>{grid}</w:tblGrid>{''.join(lines)}</w:tbl>"


# PDF 1.4 (ISO 32000-1), the standard fonts Helvetica and Helvetica-Bold, A4, streams not compressed

_WIDTH, _HEIGHT, _MARGIN = 595, 842, 64
_BODY_SIZE, _LEADING = 10, 14
_HEADING_SIZES = {1: 20, 2: 15, 3: 12}
_INDENT = 18
_CELL_PADDING = 5

# Advance widths of Helvetica in thousandths of the size, for the characters 32 to 126 (Adobe's font metrics);
# anything else counts as a digit's width.
_ADVANCES = (
    "278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 278 278 "
    "584 584 584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 722 778 667 778 722 667 611 722 667 944 "
    "667 667 611 278 278 278 469 556 333 556 556 500 556 556 278 556 556 222 222 500 222 833 556 556 556 556 333 500 "
    "278 556 500 722 500 500 500 334 260 334 584"
)
_HELVETICA = {chr(32 + n): int(width) for n, width in enumerate(_ADVANCES.split())}
_BOLD_FACTOR = 1.1  # words set in Helvetica-Bold are some 9 % wider


def _text_width(text: str, size: float, *, bold: bool = False) -> float:
    return sum(_HELVETICA.get(letter, 556) for letter in text) * size / 1000 * (_BOLD_FACTOR if bold else 1.0)


def _wrap(text: str, size: float, width: float, *, bold: bool = False) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and _text_width(longer, size, bold=bold) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def _pdf_text(x: float, y: float, size: float, text: str, *, bold: bool = False) -> str:
    quoted = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT /{'F2' if bold else 'F1'} {size:g} Tf {x:.1f} {y:.1f} Td ({quoted}) Tj ET"


class _Layout:
    """Places blocks from the top of a page down, and begins another page when one is full."""

    def __init__(self) -> None:
        self.pages: list[list[str]] = [[]]
        self.y = float(_HEIGHT - _MARGIN)

    def break_page(self) -> None:
        self.pages.append([])
        self.y = float(_HEIGHT - _MARGIN)

    def need(self, height: float) -> None:
        if self.y - height < _MARGIN and self.pages[-1]:
            self.break_page()

    def show(self, x: float, y: float, size: float, text: str, *, bold: bool = False) -> None:
        self.pages[-1].append(_pdf_text(x, y, size, text, bold=bold))

    def heading(self, level: int, text: str) -> None:
        size = _HEADING_SIZES[level]
        lines = _wrap(text, size, _WIDTH - 2 * _MARGIN, bold=True)
        # A heading stays with the three lines after it.
        self.need(len(lines) * size * 1.3 + 8 + 3 * _LEADING)
        self.y -= 8
        for line in lines:
            self.y -= size * 1.3
            self.show(_MARGIN, self.y, size, line, bold=True)
        self.y -= 4

    def paragraph(self, text: str, *, mark: str = "") -> None:
        indent = _INDENT if mark else 0
        for number, line in enumerate(_wrap(text, _BODY_SIZE, _WIDTH - 2 * _MARGIN - indent)):
            self.need(_LEADING)
            self.y -= _LEADING
            if mark and number == 0:
                self.show(_MARGIN, self.y, _BODY_SIZE, mark)
            self.show(_MARGIN + indent, self.y, _BODY_SIZE, line)
        # liteparse runs paragraphs together that stand closer.
        self.y -= 2 if mark else 18

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        height = _LEADING + 4
        self.need(height * len(rows) + 8)
        widest = [
            max(_text_width(cell, _BODY_SIZE, bold=True) for cell in column) + 4 * _CELL_PADDING
            for column in zip(*rows, strict=True)
        ]
        # Centred: liteparse takes tables above each other with a common left edge for one, and a heading between
        # them for a part of it.
        edges = [(_WIDTH - sum(widest)) / 2]
        for width in widest:
            edges.append(edges[-1] + width)
        top = self.y - 4
        for number, row in enumerate(rows):
            for cell, left in zip(row, edges, strict=False):
                baseline = top - number * height - _LEADING
                self.show(left + _CELL_PADDING, baseline, _BODY_SIZE, cell, bold=number == 0)
        bottom = top - height * len(rows)
        lines = [(edges[0], top - n * height, edges[-1], top - n * height) for n in range(len(rows) + 1)]
        lines += [(x, top, x, bottom) for x in edges]
        self.pages[-1] += [f"0.5 w {a:.1f} {b:.1f} m {c:.1f} {d:.1f} l S" for a, b, c, d in lines]
        self.y = bottom - 10


def write_pdf(blocks: Sequence[Block], *, footer: str = "") -> bytes:
    """A PDF of the blocks, on as many A4 pages as they take.

    Args:
        blocks: what to print; characters must be in Windows-1252.
        footer: printed at the foot of each page, with `{page}` and `{pages}` filled in.

    Raises:
        UnicodeEncodeError: for any other character.
    """
    layout = _Layout()
    for block in blocks:
        match block:
            case Heading(level, text):
                layout.heading(level, text)
            case Paragraph(text):
                layout.paragraph(text)
            case Items(items, numbered):
                for number, item in enumerate(items, 1):
                    layout.paragraph(item, mark=f"{number}." if numbered else "\u2022")
                layout.y -= 16
            case Table(rows):
                layout.table(rows)
            case PageBreak():
                layout.break_page()
    if footer:
        for number, page in enumerate(layout.pages, 1):
            page.append(_pdf_text(_MARGIN, 36, 8, footer.format(page=number, pages=len(layout.pages))))
    return _pdf_file(["\n".join(page).encode("cp1252") for page in layout.pages])


def _pdf_file(pages: Sequence[bytes]) -> bytes:
    """Objects 1 to 4 are catalog, page tree and fonts; each page then takes two, itself and its content."""
    kids = " ".join(f"{5 + 2 * n} 0 R" for n in range(len(pages)))
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /{} /Encoding /WinAnsiEncoding >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        font.format("Helvetica").encode(),
        font.format("Helvetica-Bold").encode(),
    ]
    for number, content in enumerate(pages):
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {_WIDTH} {_HEIGHT}] /Contents {6 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R /F2 4 0 R >> >> >>".encode()
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n".encode() + content + b"\nendstream")
    # The second line tells transfer programs that the file is binary.
    data = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    offsets: list[int] = []
    for number, item in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n".encode() + item + b"\nendobj\n"
    start = len(data)
    data += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    data += b"".join(f"{offset:010d} 00000 n \n".encode() for offset in offsets)
    data += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()
    return bytes(data)
