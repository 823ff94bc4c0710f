"""What the embedder gives: the requests that our worker makes, by the same client, and the vectors thrown away."""

from __future__ import annotations

import asyncio

from benchmarks.contenders.embed_texts import BATCH, MODEL, Race, made_texts
from benchmarks.contenders.lap import Lap, measured
from upload_pipeline.providers.openai_embedder import OpenAIEmbedder


async def run(race: Race) -> Lap:
    """All texts."""
    embedder = OpenAIEmbedder(api_key=race.api_key, base_url=race.api_url, model=MODEL)
    texts = made_texts(race.texts)
    parts = iter([texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH)])

    async def ask() -> int:
        asked = 0
        for part in parts:
            asked += len((await embedder.request(part)).vectors)
        return asked

    await embedder.request(["warm"])
    with measured() as lap:
        asked = await asyncio.gather(*(ask() for _ in range(race.concurrency)))
    assert sum(asked) == race.texts
    await embedder.close()
    return lap
