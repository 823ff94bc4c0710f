"""How much of a text the next chunk may take, and what is put around it there."""

from __future__ import annotations

from dataclasses import dataclass

from upload_pipeline.text.blocks import Block, BlockKind
from upload_pipeline.text.boundaries import byte_cut, overlap_start, skip_blank

MIN_TARGET_CHARS = 100
MIN_MAX_BYTES = 400
_LONG_BLANK = 64


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """How large chunks are.

    Attributes:
        target_chars: characters that a chunk's text should have, all that is repeated in it included; at least 100.
        overlap_chars: characters of it that may repeat the text before; 0 to half the target.
        max_bytes: bytes of UTF-8 that a chunk's text never exceeds; at least 400.

    Raises:
        ValueError: a number is outside its range.
    """

    target_chars: int = 2000
    overlap_chars: int = 200
    max_bytes: int = 8000

    def __post_init__(self) -> None:
        if self.target_chars < MIN_TARGET_CHARS:
            raise ValueError(f"target_chars must be at least {MIN_TARGET_CHARS}, got {self.target_chars}")
        if not 0 <= self.overlap_chars <= self.target_chars // 2:
            raise ValueError(
                f"overlap_chars must be from 0 to half of target_chars ({self.target_chars // 2}), "
                f"got {self.overlap_chars}: more would repeat more than it adds"
            )
        if self.max_bytes < MIN_MAX_BYTES:
            raise ValueError(
                f"max_bytes must be at least {MIN_MAX_BYTES}, got {self.max_bytes}: "
                "less leaves no room beside a repeated table header or fence"
            )


@dataclass(frozen=True, slots=True)
class Room:
    """The limits of one chunk; offsets in the text, which may lie behind its end.

    Attributes:
        before: what is repeated in front: overlap, a table's header or a fence's opening line.
        base: where the chunk's own text starts, behind blank space too long to be kept.
        soft: where it should end at the latest.
        hard: where it ends at the latest when that keeps a block or a section whole: a quarter of the target more.
        budget: bytes of UTF-8 that are left for it.
    """

    before: str
    base: int
    soft: int
    hard: int
    budget: int

    @property
    def size(self) -> int:
        """Characters up to `soft`."""
        return self.soft - self.base

    def cap(self, text: str) -> int:
        """Where the byte limit ends it, whatever the target is."""
        return byte_cut(text, self.base, self.base + self.budget, self.budget)


def make_room(text: str, position: int, before: str, options: ChunkOptions) -> Room:
    """The room of a chunk that starts at `position` with `before` in front."""
    base = skip_blank(text, position, len(text))
    if base - position <= min(_LONG_BLANK, options.target_chars // 4):
        base = position
    budget = options.max_bytes - len(before.encode("utf-8", "surrogatepass"))
    soft = base + options.target_chars - len(before)
    hard = byte_cut(text, base, soft + options.target_chars // 4, budget)
    return Room(before, base, min(soft, hard), hard, budget)


def repeated_before(text: str, blocks: tuple[Block, ...], index: int, position: int, options: ChunkOptions) -> str:
    """What is repeated in front of a chunk that starts at `position`, in block `index`."""
    block = blocks[index]
    if position > block.start:
        if block.kind is BlockKind.FENCE:
            return _opening(block, position, options)
        if block.kind is BlockKind.TABLE:
            return _table_header(text, block, position, options)
    if block.kind is BlockKind.HEADING:
        return ""
    # A sixteenth of the bytes is a quarter of them in the widest characters.
    size = min(options.overlap_chars, options.max_bytes // 16)
    if size == 0:
        return ""
    nearest = index if position > block.start else index - 1
    floor = position
    while nearest >= 0 and floor > position - size:
        if blocks[nearest].kind in (BlockKind.HEADING, BlockKind.FENCE, BlockKind.TABLE):
            break
        floor = blocks[nearest].start
        nearest -= 1
    start = overlap_start(text, floor, position, size)
    return "" if skip_blank(text, start, position) == position else text[start:position]


def closing_reserve(block: Block, room: Room) -> int:
    """Characters to keep free behind a part of a fence: for its closing line, its own or the one added."""
    if block.fence is None:
        return 0
    added = 1 + len(block.fence.closing)
    own = block.stop - block.tail if block.closed else 0
    return max(added, own) if own <= room.size // 4 else added


def closed_after(block: Block, cut: int, body: str) -> str:
    """What closes a chunk whose text `body` ends at offset `cut`, in `block`."""
    if block.fence is None or cut <= block.body - 1 or (block.closed and cut >= block.stop):
        return ""
    return ("" if body.endswith("\n") else "\n") + block.fence.closing


def _opening(block: Block, position: int, options: ChunkOptions) -> str:
    if block.fence is None or position < block.body:
        return ""
    opening = block.fence.opening
    if len(opening) > options.target_chars // 2:
        opening = block.fence.closing
    return opening + "\n"


def _table_header(text: str, block: Block, position: int, options: ChunkOptions) -> str:
    if position < block.body or block.body - block.start > options.target_chars // 2:
        return ""
    header = text[block.start : block.body]
    return header if len(header.encode("utf-8", "surrogatepass")) <= options.max_bytes // 3 else ""
