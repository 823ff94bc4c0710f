"""More of the document around each hit: its neighbours, or its section. What is read is the user's, as the hits are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from uuid import UUID

from upload_pipeline.database.as_user import Pool, as_user
from upload_pipeline.database.failures import DATABASE_FAILURES, translate
from upload_pipeline.search.query import Hit

REACH = 10
"""Most chunks to either side of a hit that its section adds; sections have no bound, answers must."""

_MAX_OVERLAP = 1000


class Expansion(StrEnum):
    """How much of the document comes with a hit."""

    NONE = "none"
    NEIGHBOURS = "neighbours"
    SECTION = "section"


# The innermost section is the last of a chunk's path; what lies below it belongs to it. A chunk without a section has
# as its section what stands around it without one.
_AROUND = """
select h.chunk_id as hit, c.ordinal, c.text, c.start_offset, c.end_offset, c.page_from, c.page_to
  from unnest($1::uuid[]) a (chunk_id)
  join upload_pipeline.document_chunks h on h.chunk_id = a.chunk_id
  join upload_pipeline.document_chunks c
    on c.document_id = h.document_id and c.live and c.ordinal between h.ordinal - $2 and h.ordinal + $2
 where not $3
    or case when cardinality(h.section_ids) = 0 then cardinality(c.section_ids) = 0
            else h.section_ids[cardinality(h.section_ids)] = any (c.section_ids) end
 order by h.chunk_id, c.ordinal
"""


@dataclass(frozen=True, slots=True)
class _Piece:
    ordinal: int
    text: str
    start: int
    end: int
    page_from: int | None
    page_to: int | None


async def expand_hits(db: Pool, *, user_id: UUID, hits: Sequence[Hit], expansion: Expansion) -> tuple[Hit, ...]:
    """The hits with text, span and pages widened; their order, scores and chunk ids stay.

    Args:
        db: connections of role `upload_worker`, which may become `authenticated`.
        user_id: whose hits they are.
        hits: as `search` found them.
        expansion: `neighbours` adds the chunk before and the chunk behind, `section` the chunks of the innermost
            section around the hit, at most `REACH` to either side.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    if expansion is Expansion.NONE or not hits:
        return tuple(hits)
    by_section = expansion is Expansion.SECTION
    try:
        async with as_user(db, user_id) as connection:
            rows = await connection.fetch(
                _AROUND, [hit.chunk_id for hit in hits], REACH if by_section else 1, by_section
            )
    except DATABASE_FAILURES as error:
        raise translate(error, "read around the hits") from error
    around: dict[UUID, list[_Piece]] = {}
    for row in rows:
        around.setdefault(row["hit"], []).append(_piece(row))
    # A hit whose document was deleted since has nothing around it and stays as it was found.
    return tuple(_widened(hit, around.get(hit.chunk_id, [])) for hit in hits)


def _piece(row: Any) -> _Piece:
    return _Piece(row["ordinal"], row["text"], row["start_offset"], row["end_offset"], row["page_from"], row["page_to"])


def _widened(hit: Hit, pieces: Sequence[_Piece]) -> Hit:
    place = next((i for i, piece in enumerate(pieces) if piece.start <= hit.start < piece.end), None)
    if place is None:
        return hit
    # Only what joins on without a gap: a section may be interrupted by another one.
    first = last = place
    while first > 0 and pieces[first - 1].ordinal == pieces[first].ordinal - 1:
        first -= 1
    while last + 1 < len(pieces) and pieces[last + 1].ordinal == pieces[last].ordinal + 1:
        last += 1
    chosen = pieces[first : last + 1]
    text = chosen[0].text
    for piece in chosen[1:]:
        text = _joined(text, piece.text)
    return replace(
        hit, text=text, start=chosen[0].start, end=chosen[-1].end, page=chosen[0].page_from, page_to=chosen[-1].page_to
    )


def _joined(text: str, following: str) -> str:
    """Two texts of chunks in a row as one: what the second repeats of the first's end is there once."""
    for length in range(min(_MAX_OVERLAP, len(text), len(following)), 0, -1):
        if text.endswith(following[:length]):
            return text + following[length:]
    separator = "" if text.endswith("\n") else "\n"
    return f"{text}{separator}{following}"
