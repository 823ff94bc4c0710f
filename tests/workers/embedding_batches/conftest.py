"""Batchers, and the simulator that they ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from embedding_bench import Bench, OpenBench, a_bench

from tests.simulators.openai_embeddings import OpenAISimulator
from upload_pipeline.database.embedding_models import register_model
from upload_pipeline.database.pools import open_pool
from upload_workers import embedding_batcher


@pytest.fixture
async def db(database: Any) -> AsyncIterator[Any]:
    pool = await open_pool(database.worker_url, size=5)
    await register_model(pool, model="text-embedding-3-small@16", provider="openai", dimensions=16)
    yield pool
    await pool.close()


@pytest.fixture(autouse=True)
def brisk_batcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_batcher, "_FIRST_DELAY", 0.01)


@pytest.fixture
async def open_bench(db: Any) -> AsyncIterator[OpenBench]:
    """Batchers that are closed at the end, twice."""
    opened: list[Bench] = []

    def open_one(simulator: OpenAISimulator, **options: Any) -> Bench:
        opened.append(a_bench(simulator, db, **options))
        return opened[-1]

    yield open_one
    for bench in opened:
        await bench.batcher.close()
        await bench.batcher.close()
        await bench.batcher._embedder.close()


@pytest.fixture
async def simulator() -> AsyncIterator[OpenAISimulator]:
    async with OpenAISimulator() as simulator:
        yield simulator


@pytest.fixture
async def bench(simulator: OpenAISimulator, open_bench: OpenBench) -> Bench:
    return open_bench(simulator)
