"""Which blocks go into a chunk, and where it ends: rules 4 and 5 of `chunker.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from upload_pipeline.text.blocks import Block, BlockKind, Outline, read_outline
from upload_pipeline.text.chunk_room import Room, closing_reserve
from upload_pipeline.text.splitting import split_block


@dataclass(frozen=True, slots=True)
class Source:
    """A text that is being divided.

    Attributes:
        text: all of it.
        outline: its blocks and sections.
        next_heading: for each block, and for the place behind the last, the index of the first heading from there on.
    """

    text: str
    outline: Outline
    next_heading: tuple[int, ...]

    @classmethod
    def read(cls, text: str, page_starts: Sequence[int]) -> Self:
        """Reads the outline of `text`."""
        outline = read_outline(text, page_starts)
        following = len(outline.blocks)
        found = [following]
        for index in range(len(outline.blocks) - 1, -1, -1):
            if outline.blocks[index].kind is BlockKind.HEADING:
                following = index
            found.append(following)
        return cls(text, outline, tuple(reversed(found)))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its blocks in order."""
        return self.outline.blocks

    def level(self, index: int) -> int:
        """Level of the section that block `index` stands in, 0 before any heading."""
        section = self.outline.blocks[index].section
        return self.outline.sections[section].level if section >= 0 else 0


def take_chunk(source: Source, first: int, position: int, room: Room) -> tuple[int, int]:
    """Where the chunk from `position`, in block `first`, ends, and in which block the next one starts."""
    blocks = source.blocks
    small = room.size // 4
    only_headings = True
    index = first
    while index < len(blocks):
        block = blocks[index]
        begin = max(block.start, position)
        filled = max(0, begin - room.base)
        is_heading = block.kind is BlockKind.HEADING
        if is_heading and index > first and _starts_chunk(source, first, index, filled, room):
            break
        needed = _needed(block, room)
        if needed > room.soft:
            rest = source.next_heading[index + 1 if is_heading else index]
            if _fits(blocks, index, rest, room):
                return blocks[rest - 1].end, rest
            if filled < small and needed <= room.hard:
                return block.end, index + 1
            must = index == first or (only_headings and filled < small)
            if not must and _waits(block, begin, filled, room):
                break
            cut = split_block(source.text, block, begin, room, must=must)
            if cut is None:
                break
            return cut, index if cut < block.end else index + 1
        index += 1
        only_headings = only_headings and is_heading
        if not block.closed:
            return block.end, index  # what follows must stand behind the closing line that is added
    if index == len(blocks):
        return len(source.text), index
    index = _before_last_headings(blocks, first, index)
    return blocks[index].start, index


def _starts_chunk(source: Source, first: int, index: int, filled: int, room: Room) -> bool:
    """Whether the heading at `index` ends the chunk that began in block `first` (rule 4)."""
    if source.level(first) > source.level(index):
        return filled >= room.size // 16
    if filled < room.size // 4:
        return False
    after = source.next_heading[index + 1]
    size = source.blocks[after - 1].end - source.blocks[index].start
    ends_parent = after == len(source.blocks) or source.level(after) < source.level(index)
    return size >= room.size // 8 or filled + size > (room.size if ends_parent else room.size // 2)


def _waits(block: Block, begin: int, filled: int, room: Room) -> bool:
    """Whether a block that does not fit is left for the next chunk (rule 5c)."""
    if filled >= room.size // 2:
        return True
    alone = block.stop - begin <= room.size + len(room.before)
    return alone and (filled >= room.size // 4 or block.kind in (BlockKind.FENCE, BlockKind.TABLE))


def _fits(blocks: tuple[Block, ...], index: int, rest: int, room: Room) -> bool:
    """Whether blocks `index` up to `rest`, the rest of a section, fit the stretch."""
    if _needed(blocks[rest - 1], room) > room.hard:
        return False
    return all(block.closed for block in blocks[index : rest - 1])


def _needed(block: Block, room: Room) -> int:
    return block.stop if block.closed else block.stop + closing_reserve(block, room)


def _before_last_headings(blocks: tuple[Block, ...], first: int, index: int) -> int:
    """Moves a cut before block `index` in front of the headings that would end the chunk."""
    start = index
    while start > first and blocks[start - 1].kind is BlockKind.HEADING:
        start -= 1
    return start if start > first else index
