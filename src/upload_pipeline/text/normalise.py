"""Markdown as parsers give it, brought into the one form that is stored, hashed and chunked.

What changes, in order, on each page by itself:

1. Line ends (CR LF, CR, NEL, LINE SEPARATOR, PARAGRAPH SEPARATOR, vertical tab) become LF.
2. Byte order marks, control characters other than tab and LF, and noncharacters go. Surrogate pairs become
   the character that they stand for, lone surrogates U+FFFD. So the text is valid UTF-8 without NUL, which
   Postgres `text` requires.
3. Runs of more than 30 combining marks are divided by U+034F COMBINING GRAPHEME JOINER (the Stream-Safe Text
   Format of Unicode Standard Annex 15, section 13), then the text is put in Normalization Form C. Without
   the joiners normalising takes time quadratic in the run's length: ten minutes for a megabyte of marks.
4. Outside fenced code: blank space at line ends goes (and with it the hard breaks that it meant), and a run
   of blank lines becomes one.
5. Blank lines at the page's edges go.

Pages that hold something end with LF and are joined by a blank line. Doing it again changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import regex  # type: ignore[import-untyped]

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.text.fences import Fence, closes, leaves_quote, open_fence

PAGE_BREAK = "\f"
"""What parsers put between two pages."""

_LINE_END = re.compile("\r\n|[\r\v\u0085\u2028\u2029]")
_UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(f"{chr(plane * 0x10000 + 0xFFFE)}{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(1, 17))
    + "]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK_RUN = regex.compile(r"[^\p{ccc=0}]{30}(?=[^\p{ccc=0}])")
_GRAPHEME_JOINER = "\u034f"

_BLANK_LINES = re.compile(r"\n{3,}")
_FENCE_MARK = re.compile("```|~~~")

_UNREADABLE = re.compile("[\ufffd\ue000-\uf8ff\U000f0000-\U0010fffd]|\\(cid:\\d{1,6}\\)")
_TARGET = re.compile(r"!?\[([^\]\n]{0,500}+)\]\([^()\s]*+\)")
_WORTHLESS = re.compile(
    r"\(cid:\d{1,6}\)"  # how PDF tools write a glyph that has no Unicode value
    r"|<!--[^<>\n]{0,200}-->"  # `<!-- image -->` and other placeholders
)


@dataclass(frozen=True, slots=True)
class NormalisedMarkdown:
    """Normalised text and where its pages start.

    Attributes:
        text: empty, or ends with LF.
        page_starts: for each page the offset in `text`, in characters, at which it starts; first 0, never
            decreasing. A page without text starts where the next one does. Empty when the format has no pages.
    """

    text: str
    page_starts: tuple[int, ...]


def normalise_markdown(raw: str, *, paged: bool) -> NormalisedMarkdown:
    """Brings a parser's output into the stored form.

    Args:
        raw: Markdown, its pages divided by U+000C.
        paged: whether the format has pages even where `raw` holds no U+000C, as a PDF of one page does.
    """
    raw_pages = raw.split(PAGE_BREAK)
    pages = [_page(page) for page in raw_pages]
    starts: list[int] = []
    parts: list[str] = []
    length = 0
    for page in pages:
        if page and parts:
            parts.append("\n")
            length += 1
        starts.append(length)
        if page:
            parts.append(page)
            length += len(page)
    # A page without text starts where the next one does, so the blank line between pages is before it.
    for index in range(len(pages) - 2, -1, -1):
        if not pages[index]:
            starts[index] = starts[index + 1]
    return NormalisedMarkdown("".join(parts), tuple(starts) if paged or len(raw_pages) > 1 else ())


def check_text(text: str, page_count: int | None) -> None:
    """Refuses text in which there is nothing to find: no letter and no digit, or mostly unreadable characters.

    Fence lines, image targets and comments do not count as text, since parsers write them for pages on which
    they found none. Short notes, tables of numbers and all scripts pass.

    Args:
        text: normalised Markdown.
        page_count: pages of the file, None where its format has none.

    Raises:
        PipelineError: `PARSE_EMPTY`; `details` holds `reason` (`no_text`, `no_letters` or
            `unreadable_characters`), `characters` and `page_count`.
    """
    readable = _WORTHLESS.sub("", _TARGET.sub(r"\1", _without_fence_lines(text)))
    unreadable = len(_UNREADABLE.findall(text))
    letters = len(re.sub(r"[\W_]+", "", readable))
    if letters > unreadable:
        return
    details = {"characters": len(text), "page_count": page_count}
    where = "The file" if page_count is None else f"The file's {page_count} page{'s' * (page_count != 1)}"
    hold = "hold" if page_count not in (None, 1) else "holds"
    if unreadable:
        raise PipelineError(
            ErrorCode.PARSE_EMPTY,
            f"{where} {hold} mostly characters that stand for no letter ({unreadable} of them, against {letters} "
            "letters and digits): its fonts probably do not say which letters they draw. "
            "Run OCR over it, or export it again with its text, and upload the new file.",
            {**details, "reason": "unreadable_characters"},
        )
    if page_count is not None:
        raise PipelineError(
            ErrorCode.PARSE_EMPTY,
            f"{where} {hold} no text: probably scanned images without a text layer. "
            "Run OCR over the file and upload the result.",
            {**details, "reason": "no_letters" if readable.strip() else "no_text"},
        )
    raise PipelineError(
        ErrorCode.PARSE_EMPTY,
        f"{where} {hold} no letter and no digit, so there is nothing to search for. "
        "If its text is in pictures, run OCR over them; otherwise check that this is the file you meant.",
        {**details, "reason": "no_letters" if readable.strip() else "no_text"},
    )


def _page(raw: str) -> str:
    text = _clean_characters(raw)
    text = _clean_lines(text) if _FENCE_MARK.search(text) else _squeeze(text.split("\n"))
    return _strip_edges(text)


def _clean_characters(text: str) -> str:
    text = _UNWANTED.sub("", _LINE_END.sub("\n", text))
    if text.isascii():
        return text
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = _UNWANTED.sub("", text)
    while True:
        safe = unicodedata.normalize("NFC", _MARK_RUN.sub(rf"\g<0>{_GRAPHEME_JOINER}", text))
        # A few characters fall apart into several marks, which can make a run too long after all.
        if safe == text or _MARK_RUN.search(safe) is None:
            return safe
        text = safe


def _clean_lines(text: str) -> str:
    """Drops blank space at line ends and squeezes blank lines, outside fences only."""
    done: list[str] = []
    outside: list[str] = []
    fence: Fence | None = None
    for line in text.split("\n"):
        if fence is not None and leaves_quote(fence, line, 0, len(line)):
            fence = None
        if fence is None:
            outside.append(line)
            fence = open_fence(line, 0, len(line))
            if fence is not None:
                done.append(_squeeze(outside))
                outside = []
        elif closes(fence, line, 0, len(line)):
            outside.append(line)
            fence = None
        else:
            done.append(line)
    if outside:
        done.append(_squeeze(outside))
    return "\n".join(done)


def _squeeze(lines: list[str]) -> str:
    return _BLANK_LINES.sub("\n\n", "\n".join([line.rstrip() for line in lines]))


def _strip_edges(text: str) -> str:
    text = text.rstrip()
    first = len(text) - len(text.lstrip())
    # Indentation of the first line is kept: it can be what makes it code or an item of a list.
    start = text.rfind("\n", 0, first) + 1
    return text[start:] + "\n" if text else ""


def _without_fence_lines(text: str) -> str:
    if _FENCE_MARK.search(text) is None:
        return text
    return "\n".join([line for line in text.split("\n") if open_fence(line, 0, len(line)) is None])
