r"""Where prose may be cut: at lines, list items, sentences, words and, at the least, grapheme clusters.

Each search looks at one window of the text and costs time in proportion to it. A cut is an offset: what
stands before it and what stands from it on go apart. None of them parts a grapheme cluster (Unicode Standard
Annex 29, as the `regex` module implements `\X`).
"""

from __future__ import annotations

import re

import regex  # type: ignore[import-untyped]

# fmt: off
ABBREVIATIONS = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "hon", "rev", "gen", "gov", "sgt", "lt", "jr", "sr", "st", "mt",
    "co", "corp", "dept", "inc", "ltd", "univ", "est",
    "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec",
    "abs", "art", "ch", "chap", "cf", "ed", "fig", "figs", "nos", "nr", "p", "para", "pp", "ref", "refs",
    "sec", "sect", "tab", "vol",
    "al", "approx", "bzw", "ca", "eg", "e.g", "esp", "etc", "i.e", "ie", "max", "min", "usw", "viz", "vs",
    "z.b",
})
# fmt: on
"""Words, in lower case and without their last full stop, after which a full stop ends no sentence."""

_SENTENCE_END = re.compile(
    r"""[.!?…][*_"'”’»)\]]{0,4}\s++"""  # the scripts that put a space behind a sentence
    r"""|[。！？｡؟۔।॥።][*_"'”’»）」』】)\]]{0,4}\s*+"""  # those that need none
)
_ITEM = re.compile(r"^([ \t]*+)(?:[-*+]|\d{1,9}[.)])[ \t]", re.MULTILINE)
_CLAUSE_END = re.compile("[、，；：､]")
_BLANK = re.compile(r"\s++")
_NOT_BLANK = re.compile(r"\S")
_GRAPHEME = regex.compile(r"\X")
_LONGEST_ABBREVIATION = 8


def skip_blank(text: str, start: int, end: int) -> int:
    """Offset of the first character in `text[start:end]` that is not blank, `end` where there is none."""
    found = _NOT_BLANK.search(text, start, end)
    return end if found is None else found.start()


def after_blank(text: str, cut: int, end: int) -> int:
    """Moves a cut, above 0, behind the blank space that follows it, so that no part begins with blank space.

    Indentation stays with the line that it indents, and a space that carries a combining mark with its mark.
    """
    position = skip_blank(text, cut, end)
    if position == end:
        return end
    line = text.rfind("\n", cut, position) + 1
    if line > 0:
        return line
    if text[cut - 1] == "\n":
        return cut
    return position if position == cut or not _joined(text, position) else position - 1


def line_cut(text: str, low: int, high: int) -> int | None:
    """The last start of a line in `text`, at offsets above `low` and up to `high`."""
    cut = text.rfind("\n", low, high) + 1
    return cut if cut > low else None


def blank_line_cut(text: str, low: int, high: int) -> int | None:
    """The last start of a line behind a blank line, at offsets above `low` and up to `high`."""
    cut = text.rfind("\n\n", low, high) + 2
    return cut if cut > low + 1 else None


def item_cut(text: str, low: int, high: int) -> int | None:
    """The last start of a list item among the outermost ones, at offsets above `low` and up to `high`."""
    best, depth = None, 0
    for found in _ITEM.finditer(text, low + 1, min(len(text), high + 64)):
        if found.start() > high:
            break
        indent = len(found[1])
        if best is None or indent <= depth:
            best, depth = found.start(), indent
    return best


def sentence_cut(text: str, low: int, high: int) -> int | None:
    """The last start of a sentence at offsets above `low` and up to `high`."""
    best = None
    for found in _SENTENCE_END.finditer(text, low, high):
        if found.end() > low and _ends_sentence(text, found):
            best = found.end()
    return best


def word_cut(text: str, low: int, high: int) -> int | None:
    """The last start of a word, or of a clause where words are not divided, above `low` and up to `high`."""
    window = text[low:high]
    if high >= len(text) or text[high].isspace() or window[-1:].isspace():
        cut = high
    else:
        parts = window.rsplit(None, 1)
        cut = high - len(parts[-1]) if parts else high
    if low < cut and not _joined(text, cut):
        return cut
    best = None
    for found in _CLAUSE_END.finditer(text, low, high):
        if not _joined(text, found.end()):
            best = found.end()
    return best


def grapheme_cut(text: str, start: int, high: int, ceiling: int) -> int:
    """The last end of a grapheme cluster in `text`, above `start` and up to `high`.

    Args:
        text: any text.
        start: where the part that is to be cut starts; itself a boundary.
        high: where the part should end at the latest.
        ceiling: how far it may reach, at least `high`, when its first cluster alone passes `high`. A cluster that
            passes `ceiling` too is cut there, between two code points.
    """
    if high >= len(text):
        return len(text)
    if _plain(text[high - 1]) and _plain(text[high]):
        return high
    # A copy of the window: `\X` looks behind its start, which would make runs of flags quadratic.
    best = 0
    for found in _GRAPHEME.finditer(text[start : high + 1]):
        if found.end() > high - start:
            break
        best = found.end()
    if best > 0:
        return start + best
    first = _GRAPHEME.match(text[start : ceiling + 1])
    return ceiling if first is None else min(ceiling, start + first.end())


def overlap_start(text: str, floor: int, cut: int, size: int) -> int:
    """Where the text starts that is repeated in front of a part beginning at `cut`.

    It starts at `floor` when that is near enough, else with the first sentence of which at least a quarter
    of `size` follows, else with the first word; where there is none of these, at `cut`: nothing is repeated.

    Args:
        text: any text.
        floor: offset before which nothing may be repeated.
        cut: where the part starts.
        size: characters to repeat at most.
    """
    low = cut - size
    if low <= floor:
        start = skip_blank(text, floor, cut)
        return cut if _joined(text, start) else start
    for found in _SENTENCE_END.finditer(text, low, cut):
        if found.end() <= cut - size // 4 and _ends_sentence(text, found):
            return found.end()
    word = low if text[low - 1].isspace() and not text[low].isspace() else None
    if word is None:
        blank = _BLANK.search(text, low, cut) or _CLAUSE_END.search(text, low, cut)
        word = cut if blank is None else blank.end()
    return cut if word < cut and _joined(text, word) else word


def byte_cut(text: str, start: int, end: int, budget: int) -> int:
    """The furthest offset up to `end` such that the text from `start` takes at most `budget` bytes of UTF-8.

    The cost depends on `budget`, not on `end`. Offsets past the text's end are allowed and kept.
    """
    if text.isascii():
        return min(end, start + budget)
    end = min(end, start + budget)
    if (end - start) * 4 <= budget:
        return end
    encoded = text[start:end].encode("utf-8", "surrogatepass")
    if len(encoded) <= budget:
        return end
    while encoded[budget] & 0xC0 == 0x80:  # in the middle of a character
        budget -= 1
    return start + len(encoded[:budget].decode("utf-8", "surrogatepass"))


def _ends_sentence(text: str, found: re.Match[str]) -> bool:
    end, stop = found.end(), found.start()
    if end < len(text) and _joined(text, end):
        return False
    if text[stop] != "." or end >= len(text):
        return True
    if text[end].islower():
        return False
    before = text[max(0, stop - _LONGEST_ABBREVIATION - 1) : stop]
    if before.rstrip("0123456789")[-1:] in ("\n", "") and before[-1:].isdigit():
        return False  # the number of an item
    word = (before.rsplit(None, 1) or [""])[-1].lstrip("(*_\"'“‘«[").lower()
    return not (len(word) == 1 and word.isalpha()) and word not in ABBREVIATIONS


def _joined(text: str, offset: int) -> bool:
    """Whether blank space or punctuation before `offset` is one grapheme cluster with what follows."""
    if offset <= 0 or offset >= len(text):
        return False
    if text[offset].isascii():
        return text[offset - 1 : offset + 1] == "\r\n"
    found = _GRAPHEME.match(text[offset - 1 : offset + 1])
    return found is not None and found.end() == 2


def _plain(character: str) -> bool:
    return " " <= character <= "~"
