"""The blocks of a Markdown text and the sections that its headings open, read in one pass over its lines.

This is the part of CommonMark 0.31 and of GitHub's tables that decides where a text may be cut, and it leans
towards what plain text and parsers' output mean:

- Headings are ATX (`## title`) or setext (a line of at least two `=` or `-` under a paragraph of one line of
  at most 200 characters). Headings without a title, and those inside lists and quotes, open no section.
- A table is a line with `|` above a delimiter row with `|`, and all lines with `|` directly below. The numbers
  of cells need not agree.
- A list goes on over blank lines while what follows is an item or indented. An ordered item interrupts a
  paragraph only with number 1.
- Everything else, HTML and indented code included, is a paragraph, a block quote or a thematic break.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from upload_pipeline.text.fences import OPENING_CHARACTERS, Fence, closes, leaves_quote, open_fence

MAX_TITLE_CHARS = 200
"""Longest title of a section; the rest of a longer heading is left out of it."""

_MAX_HEADING_LINE = 1000
_INDENT = re.compile(r"[^\S\n]*")
_ATX = re.compile(r"(#{1,6})(?=[ \t]|$)")
_SETEXT = re.compile(r"(?:={2,}|-{2,})[ \t]*$")
_BREAK = re.compile(r"(?:(?:-[ \t]*+){3,}|(?:\*[ \t]*+){3,}|(?:_[ \t]*+){3,})$")
_DELIMITER_ROW = re.compile(r"\|?[ \t]*+:?-++:?[ \t]*+(?:\|[ \t]*+:?-++:?[ \t]*+)*+\|?[ \t]*+$")
_ITEM = re.compile(r"(?:[-*+]|(?P<number>\d{1,9})[.)])(?:[ \t]|$)")
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)")
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")


class BlockKind(Enum):
    """What a block is, as far as it matters for cutting."""

    HEADING = "heading"
    PARAGRAPH = "paragraph"
    LIST = "list"
    QUOTE = "quote"
    FENCE = "fence"
    TABLE = "table"
    BREAK = "break"


@dataclass(frozen=True, slots=True)
class Section:
    """What a heading opens.

    Attributes:
        ordinal: its number in document order, from 0.
        level: 1 to 6.
        title: the heading's text without Markdown, at most 200 characters and an ellipsis.
        parent: ordinal of the enclosing section, -1 at the top.
    """

    ordinal: int
    level: int
    title: str
    parent: int


@dataclass(slots=True)
class Block:
    """A run of whole lines. Blocks tile the text: blank lines belong to the block above them.

    Attributes:
        kind: what it is.
        start: offset of its first character.
        section: ordinal of the section it stands in (a heading stands in its own), -1 before any heading.
        stop: end of its last line that is not blank, without line end.
        end: where the next block starts.
        body: where a table's first row after the delimiter row, or a fence's first line of code, starts; else `start`.
        tail: where what ends a fence starts: the blank lines and the closing line behind the last line of code.
        level: 1 to 6 of a heading, else 0.
        fence: how a fence was opened.
        closed: False for a fence whose end was not written.
    """

    kind: BlockKind
    start: int
    section: int
    stop: int
    end: int = 0
    body: int = 0
    tail: int = 0
    level: int = 0
    fence: Fence | None = None
    closed: bool = True


@dataclass(frozen=True, slots=True)
class Outline:
    """A text's blocks and sections, both in document order."""

    blocks: tuple[Block, ...]
    sections: tuple[Section, ...]

    def path(self, ordinal: int) -> tuple[Section, ...]:
        """The enclosing sections of section `ordinal` and itself, outermost first; empty for -1."""
        found: list[Section] = []
        while ordinal >= 0:
            found.append(self.sections[ordinal])
            ordinal = found[-1].parent
        return tuple(reversed(found))


def read_outline(text: str, page_starts: Sequence[int] = ()) -> Outline:
    """Reads all blocks and sections of `text`.

    Args:
        text: Markdown or plain text with LF line ends.
        page_starts: offsets at which pages start, never decreasing; an open fence ends there.
    """
    reader = _Reader(text, page_starts)
    position = 0
    while position < len(text):
        line_end = text.find("\n", position)
        stop = len(text) if line_end < 0 else line_end
        reader.read_line(position, stop)
        position = stop + 1
    return reader.outline()


class _Reader:
    """The block under construction and what was seen just before the line at hand."""

    __slots__ = (
        "above", "blank", "blocks", "fence", "fence_limit", "last", "lines", "open", "page_starts", "sections", "text",
    )  # fmt: skip

    def __init__(self, text: str, page_starts: Sequence[int]) -> None:
        self.text = text
        self.page_starts = page_starts
        self.blocks: list[Block] = []
        self.sections: list[Section] = []
        self.open: Block | None = None  # the block that further lines may belong to
        self.blank = False  # the line above is blank
        self.lines = 0  # of the open block, counted without blank ones
        self.last = 0  # where the open block's last line starts
        self.above = 0  # `stop` of the open block without its last line
        self.fence: Fence | None = None
        self.fence_limit = 0

    def outline(self) -> Outline:
        end = len(self.text)
        for block in reversed(self.blocks):
            block.end = end
            end = block.start
        if self.blocks:
            self.blocks[0].start = 0
        if self.fence is not None:
            self._leave_fence(closed=False)
        return Outline(tuple(self.blocks), tuple(self.sections))

    def read_line(self, start: int, stop: int) -> None:
        text = self.text
        found = _INDENT.match(text, start, stop)
        first = start if found is None else found.end()
        if self.fence is not None and self._in_fence(start, first, stop):
            return
        if first == stop:
            self.blank = True
            return
        self._read_block_line(start, first, stop)
        self.blank = False

    def _in_fence(self, start: int, first: int, stop: int) -> bool:
        """Takes the line into the open fence; False when the fence ended before it."""
        fence, block = self.fence, self.blocks[-1]
        assert fence is not None  # noqa: S101 - asked by the caller, said for the type checker
        if start >= self.fence_limit or leaves_quote(fence, self.text, start, stop):
            self._leave_fence(closed=False)
            self.blank = True
            return False
        if closes(fence, self.text, start, stop):
            self._leave_fence(closed=True)
            block.stop = stop
        elif first < stop:
            block.stop = stop
        return True

    def _leave_fence(self, *, closed: bool) -> None:
        block = self.blocks[-1]
        block.closed = closed
        block.tail = max(block.body, min(block.stop + 1, len(self.text)))
        self.fence = None

    def _read_block_line(self, start: int, first: int, stop: int) -> None:
        text, mark, indent = self.text, self.text[first], first - start
        block = self.open
        kind = None if block is None else block.kind
        joined = kind is not None and not self.blank

        if mark in OPENING_CHARACTERS:
            fence = open_fence(text, start, stop)
            if fence is not None:
                self._start(BlockKind.FENCE, start, stop).fence = fence
                self.blocks[-1].body = min(stop + 1, len(text))
                self.fence = fence
                page = bisect_right(self.page_starts, start)
                self.fence_limit = self.page_starts[page] if page < len(self.page_starts) else len(text) + 1
                self.open = None
                return
        shallow = indent <= 3
        in_item = kind is BlockKind.LIST and indent >= 2
        if mark == "#" and shallow and not in_item and self._read_atx(start, first, stop):
            return
        if mark in "|:-" and joined and self._read_delimiter_row(first, stop):
            return
        if kind is BlockKind.TABLE and joined and text.find("|", first, stop) >= 0:
            self._extend(start, stop)
            return
        if mark in "=-" and kind is BlockKind.PARAGRAPH and joined and shallow and self._read_setext(first, stop):
            return
        if mark in "-*_" and shallow and _BREAK.match(text, first, stop):
            self._start(BlockKind.BREAK, start, stop)
            self.open = None
        elif mark == ">" and shallow and not in_item:
            self._join_or_start(BlockKind.QUOTE, joined and kind is BlockKind.QUOTE, start, stop)
        elif self._is_item(kind, first, stop, joined=joined, shallow=shallow):
            self._join_or_start(BlockKind.LIST, kind is BlockKind.LIST, start, stop)
        else:
            goes_on = joined and kind in (BlockKind.PARAGRAPH, BlockKind.QUOTE, BlockKind.LIST)
            indented = kind is BlockKind.LIST and indent > 0
            self._join_or_start(BlockKind.PARAGRAPH, goes_on or indented, start, stop)

    def _start(self, kind: BlockKind, start: int, stop: int) -> Block:
        block = Block(kind, start, len(self.sections) - 1, stop, body=start, tail=stop)
        self.blocks.append(block)
        self.open = block
        self.lines = 1
        self.last = self.above = start
        return block

    def _extend(self, start: int, stop: int) -> None:
        block = self.blocks[-1]
        self.above = block.stop
        block.stop = stop
        self.last = start
        self.lines += 1

    def _join_or_start(self, kind: BlockKind, joins: bool, start: int, stop: int) -> None:
        if joins:
            self._extend(start, stop)
        else:
            self._start(kind, start, stop)

    def _is_item(self, kind: BlockKind | None, first: int, stop: int, *, joined: bool, shallow: bool) -> bool:
        found = _ITEM.match(self.text, first, stop)
        if found is None:
            return False
        if kind is BlockKind.LIST:
            return True
        if joined and kind is BlockKind.PARAGRAPH:
            return shallow and found.end() < stop and found["number"] in (None, "1")
        return shallow

    def _read_atx(self, start: int, first: int, stop: int) -> bool:
        found = _ATX.match(self.text, first, stop)
        if found is None:
            return False
        title = self.text[found.end() : min(stop, found.end() + _MAX_HEADING_LINE)].strip()
        bare = title.rstrip("#")
        if bare == "" or bare[-1] in " \t":
            title = bare
        return self._open_section(len(found[1]), title, lambda: self._start(BlockKind.HEADING, start, stop))

    def _read_setext(self, first: int, stop: int) -> bool:
        block = self.blocks[-1]
        if self.lines != 1 or block.stop - block.start > MAX_TITLE_CHARS:
            return False
        if _SETEXT.match(self.text, first, stop) is None:
            return False
        title = self.text[block.start : block.stop]

        def turn_into_heading() -> Block:
            block.kind = BlockKind.HEADING
            block.stop = stop
            return block

        return self._open_section(1 if self.text[first] == "=" else 2, title, turn_into_heading)

    def _open_section(self, level: int, title: str, make_block: Callable[[], Block]) -> bool:
        title = _plain_title(title)
        if not title:
            return False
        parent = len(self.sections) - 1
        while parent >= 0 and self.sections[parent].level >= level:
            parent = self.sections[parent].parent
        block = make_block()
        block.section = len(self.sections)
        block.level = level
        self.sections.append(Section(block.section, level, title, parent))
        self.open = None
        return True

    def _read_delimiter_row(self, first: int, stop: int) -> bool:
        """Turns the line above into a table's header row when the line is a delimiter row."""
        text, block = self.text, self.blocks[-1]
        if block.kind not in (BlockKind.PARAGRAPH, BlockKind.LIST) or text.find("|", self.last, block.stop) < 0:
            return False
        if _DELIMITER_ROW.match(text, first, stop) is None or text.find("|", first, stop) < 0:
            return False
        if block.kind is BlockKind.LIST and not text[self.last : self.last + 48].lstrip(" \t").startswith("|"):
            return False
        if self.lines == 1:
            block.kind = BlockKind.TABLE
            block.stop = stop
        else:
            block.stop = self.above
            block = self._start(BlockKind.TABLE, self.last, stop)
        block.body = min(stop + 1, len(text))
        return True


def _plain_title(raw: str) -> str:
    """A heading's text without emphasis over it, links and escapes."""
    title = _LINK.sub(r"\1", raw[:_MAX_HEADING_LINE]).replace("**", "").strip()
    for mark in ("__", "*", "_", "`"):
        if len(title) > 2 * len(mark) and title.startswith(mark) and title.endswith(mark):
            title = title[len(mark) : -len(mark)].strip()
    title = _ESCAPE.sub(r"\1", title)
    if len(title) > MAX_TITLE_CHARS:
        title = title[:MAX_TITLE_CHARS].rsplit(None, 1)[0] + "…"
    return title
