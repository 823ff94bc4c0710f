"""Where a block that no chunk can hold is cut."""

from __future__ import annotations

from upload_pipeline.text.blocks import Block, BlockKind
from upload_pipeline.text.boundaries import (
    after_blank,
    blank_line_cut,
    grapheme_cut,
    item_cut,
    line_cut,
    sentence_cut,
    word_cut,
)
from upload_pipeline.text.chunk_room import Room, closing_reserve

_MIN_PART = 16


def split_block(text: str, block: Block, begin: int, room: Room, *, must: bool) -> int | None:
    """Where to cut `block`, of which the chunk at hand takes the part from `begin` on.

    Args:
        text: the text that the block is in.
        block: a block that does not end in `room`.
        begin: its start, or where the chunk starts when that is inside of it.
        room: the chunk's limits.
        must: whether a cut has to be found; otherwise one that would tear apart a line of code or a row of a
            table is not made, for the block may start the next chunk instead.

    Returns:
        An offset above `begin`, up to the block's end; None when nothing good was found and none must be.
    """
    if block.kind is BlockKind.FENCE:
        cut = _split_fence(text, block, begin, room, must=must)
    elif block.kind is BlockKind.TABLE:
        cut = _split_table(text, block, begin, room, must=must)
    elif room.soft - begin < _MIN_PART and not must:
        cut = None
    else:
        cut = _split_prose(text, block, begin, max(room.soft, begin + 1), room)
    return None if cut is None else after_blank(text, cut, block.end)


def _split_prose(text: str, block: Block, begin: int, high: int, room: Room) -> int:
    low = max(begin, room.base + (high - room.base) // 2)
    cut = None
    if block.kind is BlockKind.LIST:
        cut = item_cut(text, low, high)
    elif text.startswith("|", block.start):
        cut = line_cut(text, low, high)  # rows of a table without a delimiter row
    if cut is None:
        cut = sentence_cut(text, low, high) or line_cut(text, low, high)
    return _split_words(text, begin, low, high, room) if cut is None else cut


def _split_words(text: str, begin: int, low: int, high: int, room: Room) -> int:
    cut = word_cut(text, low, high)
    return grapheme_cut(text, begin, high, max(high, room.cap(text))) if cut is None else cut


def _split_fence(text: str, block: Block, begin: int, room: Room, *, must: bool) -> int | None:
    reserve = closing_reserve(block, room)
    code = max(begin, block.body)
    high = room.soft - reserve
    low = max(code, room.base + (high - room.base) // 2)
    if high > code:
        cut = blank_line_cut(text, low, high) or line_cut(text, code, high)
        if cut is not None and cut >= block.tail:
            cut = line_cut(text, code, block.tail - 1)
        if cut is not None and cut - room.base >= room.size // 4:
            return cut
    if not must:
        return None
    high = min(max(high, code + _MIN_PART), room.cap(text) - reserve)
    return _split_words(text, code, max(low, code), high, room)


def _split_table(text: str, block: Block, begin: int, room: Room, *, must: bool) -> int | None:
    row = max(begin, block.body)
    cut = line_cut(text, row, room.soft)
    if cut is not None:
        return cut
    if not must:
        return None
    # A row stays whole as long as the byte limit allows, whatever the target says.
    row_end = text.find("\n", row, room.cap(text))
    if row_end >= 0:
        return row_end + 1
    if block.end <= room.cap(text):
        return block.end
    high = max(room.soft, begin + 1)
    low = max(begin, room.base + (high - room.base) // 2)
    cell = text.rfind(" | ", low, high)
    return _split_words(text, begin, low, high, room) if cell <= low else cell + 1
