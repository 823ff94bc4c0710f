"""A batcher against the simulator and a real budget, and jobs with texts for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import numpy as np

from tests.simulators.openai_embeddings import KEY, OpenAISimulator, vector_of
from upload_pipeline.database.queue import ClaimedJob, Lease
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.openai_embedder import OpenAIEmbedder
from upload_workers.embedding_batcher import EmbeddingBatcher

USER = uuid4()


def a_job(user: UUID = USER, *, retries: int = 0) -> ClaimedJob:
    return ClaimedJob(Lease(uuid4(), 1), uuid4(), user, "document", "embedding", retries, "")


@dataclass
class Bench:
    simulator: OpenAISimulator
    batcher: EmbeddingBatcher

    async def embed(self, texts: Sequence[str], job: ClaimedJob | None = None, *, seconds: float = 60.0) -> list[str]:
        """Embeds; checks what comes; the texts that got a vector, in order. A failure is raised after that."""
        got: dict[int, np.ndarray] = {}
        self.got = got
        until = time.monotonic() + seconds
        async with aclosing(self.batcher.embed(job or a_job(), texts, until=until)) as arriving:
            async for positions, vectors in arriving:
                for position, vector in zip(positions, vectors, strict=True):
                    assert position not in got
                    np.testing.assert_allclose(vector, vector_of(texts[position], 16), rtol=1e-4, atol=1e-6)
                    got[position] = vector
        return [texts[position] for position in sorted(got)]


OpenBench = Callable[..., Bench]


def a_bench(simulator: OpenAISimulator, db: Any, **options: Any) -> Bench:
    embedder = OpenAIEmbedder(
        api_key=KEY, base_url=simulator.url, model="text-embedding-3-small", dimensions=16, timeout=2.0
    )
    asked = {
        "most": 256,
        "concurrency": 4,
        "timeout": 2.0,
        "prices": {"openai/text-embedding-3-small": {"tokens": 0.02}},
        **options,
    }
    return Bench(simulator, EmbeddingBatcher(embedder, db, ProviderCalls(), **asked))


def texts(count: int, word: str = "text") -> list[str]:
    return [f"{word} {number}" for number in range(count)]
