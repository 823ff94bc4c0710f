"""What the embedder gives: the requests that our worker makes, by the same client, and the vectors thrown away."""

from __future__ import annotations

import asyncio
import time

from benchmarks.contenders.embed_texts import BATCH, MODEL, Race, made_texts
from upload_pipeline.providers.openai_embedder import OpenAIEmbedder


async def run(race: Race) -> float:
    """Seconds for all texts."""
    embedder = OpenAIEmbedder(api_key=race.api_key, base_url=race.api_url, model=MODEL)
    texts = made_texts(race.texts)
    parts = iter([texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH)])

    async def ask() -> int:
        asked = 0
        for part in parts:
            asked += len((await embedder.request(part)).vectors)
        return asked

    await embedder.request(["warm"])
    began = time.perf_counter()
    asked = await asyncio.gather(*(ask() for _ in range(race.concurrency)))
    seconds = time.perf_counter() - began
    assert sum(asked) == race.texts
    await embedder.close()
    return seconds
