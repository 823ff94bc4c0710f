"""Our worker, from chunks in the buffer: storing them, with their words for full-text search, is part of the race."""

from __future__ import annotations

from benchmarks.contenders.embed_ours import lead
from benchmarks.contenders.embed_texts import Race


async def run(race: Race) -> float:
    """Seconds from buffered chunks until the last is searchable."""
    return await lead(race, "chunks_buffered")
