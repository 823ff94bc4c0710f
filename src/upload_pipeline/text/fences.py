"""Fenced code blocks: how one opens, what closes it, and how a part of one is made whole again.

The rules are CommonMark 0.31, section 4.5, with four differences that keep them free of context and of
unbounded work: a fence may be indented as deep as the list that holds it; its marker has at most 32
characters; an opening line of more than 120 bytes opens nothing; and a fence ends with its page at the
latest, since parsers write each page on its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_OPENING_BYTES = 120
"""Longest opening line, so that what is repeated in front of a continued fence stays small."""

OPENING_CHARACTERS = frozenset("`~>-*+0123456789")
"""What the first character of an opening line can be: its marker, a quote's or a list's."""

_OPEN = re.compile(
    r"(?P<quote>(?:[ ]{0,3}>[ \t]?){0,8})"
    r"(?P<indent>[ \t]{0,40})"
    r"(?P<item>(?:(?:[-*+]|\d{1,9}[.)])[ \t]{1,4}){0,4})"
    r"(?P<marker>`{3,32}|~{3,32})"
    r"(?P<info>[^\n]*)"
)
_CLOSE = re.compile(r"(?P<quote>(?:[ ]{0,3}>[ \t]?){0,8})(?P<indent>[ \t]{0,48})(?P<marker>`{3,64}|~{3,64})[ \t]*$")
_QUOTE = re.compile(r"(?:[ ]{0,3}>[ \t]?){0,8}")


@dataclass(frozen=True, slots=True)
class Fence:
    """An opened fence.

    Attributes:
        lead: what stands in front of the marker on a line that continues the same container.
        marker: the run of backticks or tildes.
        info: the rest of the opening line, without blanks around it.
        quotes: how many block quotes it stands in.
        indent: columns of blank space that a closing line may have at most.
    """

    lead: str
    marker: str
    info: str
    quotes: int
    indent: int

    @property
    def opening(self) -> str:
        """The line that opens it again, without line end."""
        return f"{self.lead}{self.marker}{self.info}"

    @property
    def closing(self) -> str:
        """The line that closes it, without line end."""
        return f"{self.lead}{self.marker}"


def open_fence(text: str, start: int, stop: int) -> Fence | None:
    """The fence that the line `text[start:stop]` opens, or None.

    Args:
        text: any text.
        start: where the line starts.
        stop: where it ends, before its line end.
    """
    if stop - start > MAX_OPENING_BYTES:
        return None
    found = _OPEN.match(text, start, stop)
    if found is None or len(found[0].encode("utf-8", "surrogatepass")) > MAX_OPENING_BYTES:
        return None
    marker, info = found["marker"], found["info"].strip()
    if info.startswith(marker[0]) or (marker[0] == "`" and "`" in info):
        return None
    lead = found["quote"] + found["indent"] + " " * len(found["item"])
    indent = len(found["indent"]) + len(found["item"]) + 3
    return Fence(lead, marker, info, quotes=found["quote"].count(">"), indent=indent)


def closes(fence: Fence, text: str, start: int, stop: int) -> bool:
    """Whether the line `text[start:stop]` closes `fence`."""
    found = _CLOSE.match(text, start, stop)
    return (
        found is not None
        and found["marker"][0] == fence.marker[0]
        and len(found["marker"]) >= len(fence.marker)
        and len(found["indent"]) <= fence.indent
        and found["quote"].count(">") == fence.quotes
    )


def leaves_quote(fence: Fence, text: str, start: int, stop: int) -> bool:
    """Whether the line `text[start:stop]` stands outside the block quote that holds `fence`, and so ends it."""
    if fence.quotes == 0:
        return False
    found = _QUOTE.match(text, start, stop)
    return found is None or found[0].count(">") < fence.quotes
