"""Our worker, from chunks in the buffer: storing them, with their words for full-text search, is part of the race."""

from __future__ import annotations

from benchmarks.contenders.embed_ours import lead
from benchmarks.contenders.embed_texts import Race
from benchmarks.contenders.lap import Lap


async def run(race: Race) -> Lap:
    """From buffered chunks until the last is searchable."""
    return await lead(race, "chunks_buffered")
