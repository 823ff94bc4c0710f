"""Markdown into chunks for retrieval: the chunker `markdown-simple`, version 1.

The rules, in order. A change to any of them that moves a cut or alters a chunk's text is a new version.

1. Blocks. The text is read as headings, paragraphs, lists, block quotes, fenced code, tables and thematic
   breaks (`blocks.py`, `fences.py`). Plain text is paragraphs. Blank lines belong to the block above.
2. Spans. Chunks cover the text in order, without gap or overlap. Blank text has no chunks. No chunk is blank.
3. Limits. A chunk's text, all that is repeated in it included, aims at `target_chars`. It may have a quarter
   more ("the stretch") only to keep something whole as said below, and never has more than `max_bytes` bytes of
   UTF-8. "The room" is the target less what is repeated in front, or what the byte limit leaves, if less.
4. Headings. A heading starts a new chunk, unless
   a) what stands in the chunk is small: under a quarter of the room, or under a sixteenth when the heading
      outranks the section in which the chunk began; or
   b) its section is tiny (under an eighth of the room up to the next heading), does not outrank, and the two
      together stay within half the room, or within the room when the enclosing section ends with it.
   A heading is not left at the end of a chunk while there is something else in front of it.
5. Blocks are added while they fit the room. When one does not:
   a) if the rest of the section fits the stretch, all of it is taken;
   b) if what stands in the chunk is small (under a quarter of the room) and the block fits the stretch, it is taken;
   c) if what stands in the chunk is not small and the block would fit a chunk of its own, or is code or a table
      that would, or what stands takes half the room, the chunk ends before the block;
   d) otherwise the block is cut, and the chunk ends there.
6. Cuts inside a block, each at the last such place in the second half of the room: a list at its outermost items,
   then like prose; prose at a sentence, else a line, else a word (in scripts without spaces: a clause), else
   a grapheme cluster; code at a blank line, else at the last line that fits, else (none fits, or those that do
   take under a quarter of the room) inside the line like words; a table at the last row that fits. A row that is
   too long for the room stays whole up to the byte limit, and is cut at a cell, word or grapheme cluster beyond
   it. A grapheme cluster is parted only when it alone exceeds the byte limit: then at that limit, between two
   code points. Blank space at a cut goes with the part before, indentation with its line.
7. What is repeated. A continued table begins with its header and delimiter row, unless these take more than
   half the target or a third of the bytes. Continued code begins with its opening line again, and code that does
   not end in its chunk, or never ends, gets a closing line. Any other chunk that does not begin with a heading
   repeats the end of the text before: at most `overlap_chars` (and a sixteenth of `max_bytes`), from the
   start of a sentence or else of a word, never from before the last heading, code or table.
8. A chunk's text is what is repeated, its span, and what closes it. Only where blank space at the ends of the
   span would not fit, or is longer than 64 characters (a quarter of the target) at its start, is it left out.
9. Section. A chunk belongs to the section in which its span begins; headings with nothing but a deeper heading
   below are passed over. Its pages are those of the first and last character of its span that is not blank.

Time and memory grow with the text's length: each chunk costs at most a fixed multiple of its limits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from upload_pipeline.text.blocks import Block, BlockKind
from upload_pipeline.text.boundaries import skip_blank
from upload_pipeline.text.chunk_room import ChunkOptions, Room, closed_after, make_room, repeated_before
from upload_pipeline.text.packing import Source, take_chunk

__all__ = ["CHUNKER", "Chunk", "ChunkOptions", "chunk_markdown"]

CHUNKER = "markdown-simple@1"
"""Name and version: part of each chunk's identity."""

_DEFAULT_OPTIONS = ChunkOptions()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a text.

    Attributes:
        ordinal: its number, from 0.
        start: offset of its span in the text, in characters.
        end: where its span ends and the next one's starts.
        text: what is embedded and shown.
        heading_path: titles of the sections it stands in, outermost first.
        section_ordinals: the numbers of these sections in document order, from 0.
        page_from: first page, from 1; None where the text has no pages.
        page_to: last page.
    """

    ordinal: int
    start: int
    end: int
    text: str
    heading_path: tuple[str, ...]
    section_ordinals: tuple[int, ...]
    page_from: int | None
    page_to: int | None


def chunk_markdown(
    text: str, *, page_starts: Sequence[int] = (), options: ChunkOptions = _DEFAULT_OPTIONS
) -> list[Chunk]:
    """Divides a text into chunks, by the rules of this module.

    Args:
        text: Markdown or plain text, normalised by `normalise_markdown`.
        page_starts: offsets at which its pages start, as `normalise_markdown` gives them.
        options: sizes.

    Raises:
        ValueError: `page_starts` does not begin with 0, decreases, or passes the text's end.
    """
    _check_pages(page_starts, len(text))
    if not text or text.isspace():
        return []
    source = Source.read(text, page_starts)
    chunks: list[Chunk] = []
    position = index = 0
    while position < len(text):
        before = repeated_before(text, source.blocks, index, position, options)
        room = make_room(text, position, before, options)
        end, following = take_chunk(source, index, position, room)
        chunks.append(_make_chunk(source, len(chunks), (position, end), (index, following), room, page_starts))
        position, index = end, following
    return chunks


def _make_chunk(
    source: Source,
    ordinal: int,
    span: tuple[int, int],
    indexes: tuple[int, int],
    room: Room,
    page_starts: Sequence[int],
) -> Chunk:
    start, end = span
    first, following = indexes
    inside = following < len(source.blocks) and source.blocks[following].start < end
    last = source.blocks[following if inside else following - 1]
    path = source.outline.path(_own_section(source.blocks, first, following, start))
    page_from, page_to = _pages(source.text, page_starts, start, end)
    return Chunk(
        ordinal=ordinal,
        start=start,
        end=end,
        text=_chunk_text(source.text, room, end, last),
        heading_path=tuple(section.title for section in path),
        section_ordinals=tuple(section.ordinal for section in path),
        page_from=page_from,
        page_to=page_to,
    )


def _chunk_text(text: str, room: Room, end: int, last: Block) -> str:
    body = text[room.base : end]
    if end > room.hard:
        shown = body.rstrip()
        if room.base + len(shown) <= room.hard or end > room.cap(text):
            body = shown
    return room.before + body + closed_after(last, end, body)


def _own_section(blocks: tuple[Block, ...], first: int, following: int, start: int) -> int:
    """Ordinal of the section of the first content from `start` on, in blocks `first` up to `following`."""
    if blocks[first].start == start:
        while (
            first + 1 < following
            and blocks[first].kind is BlockKind.HEADING
            and blocks[first + 1].kind is BlockKind.HEADING
            and blocks[first + 1].level > blocks[first].level
        ):
            first += 1
    return blocks[first].section


def _pages(text: str, page_starts: Sequence[int], start: int, end: int) -> tuple[int | None, int | None]:
    if not page_starts:
        return None, None
    first = skip_blank(text, start, end)
    last = start + len(text[start:end].rstrip()) - 1
    return bisect_right(page_starts, first), bisect_right(page_starts, max(first, last))


def _check_pages(page_starts: Sequence[int], length: int) -> None:
    previous = 0
    for number, start in enumerate(page_starts, 1):
        if start < previous or start > length or (number == 1 and start != 0):
            raise ValueError(
                f"page {number} cannot start at offset {start}: pages start at 0, in order, within {length} characters"
            )
        previous = start
