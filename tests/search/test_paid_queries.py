"""Queries that a hosted provider embeds: within the budget, in the books of who asked, never in the way of a search."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

from tests.simulators.openai_embeddings import KEY, Fault, OpenAISimulator, vector_of
from upload_pipeline.database.embedding_models import register_model
from upload_pipeline.database.pools import BoundedPool
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.providers.openai_embedder import EmbeddingError, OpenAIEmbedder
from upload_pipeline.providers.provider_failures import Remedy
from upload_pipeline.search import paid_queries as module
from upload_pipeline.search.paid_queries import PaidQueries, paid_queries
from upload_pipeline.search.query import search
from upload_pipeline.search.query_models import QueryModels
from upload_pipeline.settings import load_settings

MODEL = "text-embedding-3-small"


@pytest.fixture
async def simulator() -> AsyncIterator[OpenAISimulator]:
    async with OpenAISimulator(requests_per_minute=5) as simulator:
        yield simulator


@pytest.fixture
async def paid(simulator: OpenAISimulator, db: BoundedPool, tmp_path: Any) -> AsyncIterator[PaidQueries]:
    settings = load_settings(
        home=tmp_path, embedder="openai", openai_api_key=KEY, prices={f"openai/{MODEL}": {"tokens": 0.02}}
    )
    hosted = OpenAIEmbedder(api_key=KEY, base_url=simulator.url, model=MODEL, timeout=5)
    made = paid_queries(hosted, db, ProviderCalls(), settings)
    assert made is not None
    yield made
    await hosted.close()


async def books(admin: asyncpg.Connection) -> list[tuple[Any, ...]]:
    rows = await admin.fetch(
        "select user_id, operation, requests, tokens, cost_micros from upload_pipeline.usage_records order by at"
    )
    return [tuple(row) for row in rows]


async def test_a_query_is_paid_for_once_and_stands_in_the_books_of_who_asked(
    paid: PaidQueries, simulator: OpenAISimulator, admin: asyncpg.Connection, user: UUID
) -> None:
    vector = await paid.embed("water damage", user_id=user)
    assert np.allclose(vector, vector_of("water damage", 1536), atol=1e-6)
    tokens = simulator.books.tokens
    assert tokens > 0
    ((who, operation, requests, counted, cost),) = await books(admin)
    assert (who, operation, requests, counted) == (user, "search", 1, tokens)
    assert float(cost) == pytest.approx(tokens * 0.02)
    budget = await admin.fetchrow("select calls, tokens, request_limit from upload_pipeline.provider_budgets")
    assert tuple(budget) == (1, tokens, 5)


async def test_a_query_that_was_asked_before_costs_nothing_unless_another_user_asked_it(
    paid: PaidQueries, simulator: OpenAISimulator, db: BoundedPool, admin: asyncpg.Connection, user: UUID
) -> None:
    other = uuid4()
    await register_model(db, model=MODEL, provider="openai", dimensions=1536)
    for who in (user, other):
        await admin.execute("insert into upload_pipeline.lanes (pool, user_id) values ('default', $1)", who)
    first = await paid.embed("water damage", user_id=user)
    again = await paid.embed("water damage", user_id=user)
    assert again.tobytes() == first.tobytes()
    assert simulator.books.requests == 1
    await paid.embed("water damage", user_id=other)
    assert simulator.books.paid == {"water damage": 2}
    rows = await admin.fetch("select user_id, requests, cached, cost_micros from upload_pipeline.usage_records")
    assert sorted((row["user_id"] == user, row["requests"], row["cached"]) for row in rows) == [
        (False, 1, 0),
        (True, 0, 1),
        (True, 1, 0),
    ]
    assert (
        paid.calls.registry.get_sample_value(
            "upload_pipeline_provider_cached_total", {"provider": "openai", "operation": "search"}
        )
        == 1
    )


async def test_a_cache_that_cannot_be_read_or_written_fails_no_search(
    paid: PaidQueries, simulator: OpenAISimulator, admin: asyncpg.Connection, user: UUID
) -> None:
    await admin.execute("alter table upload_pipeline.embedding_cache rename to embedding_cache_away")
    assert (await paid.embed("hail", user_id=user)).shape == (1536,)
    await admin.execute("alter table upload_pipeline.embedding_cache_away rename to embedding_cache")
    assert simulator.books.requests == 1


async def test_a_full_minute_is_told_and_not_tried(paid: PaidQueries, simulator: OpenAISimulator, user: UUID) -> None:
    for number in range(5):
        await paid.embed(f"query {number}", user_id=user)
    with pytest.raises(PipelineError, match=r"rate limit is reached.*mode `text`") as caught:
        await paid.embed("one more", user_id=user)
    assert caught.value.code is ErrorCode.EMBED_FAILED
    assert 50 < caught.value.details["retry_after"] <= 61
    assert (simulator.books.requests, simulator.books.over_limit) == (5, 0)


async def test_a_failure_that_passes_is_tried_again_and_one_that_does_not_is_told(
    paid: PaidQueries, simulator: OpenAISimulator, admin: asyncpg.Connection, user: UUID, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "_FIRST_DELAY", 0.0)
    simulator.misbehave(Fault.SERVER_ERROR)
    await paid.embed("hail", user_id=user)
    assert len(await books(admin)) == 1
    simulator.misbehave(Fault.QUOTA)
    with pytest.raises(PipelineError) as caught:
        await paid.embed("wind", user_id=user)
    assert caught.value.code is ErrorCode.EMBED_QUOTA
    assert simulator.books.requests == 3
    assert await admin.fetchval("select calls from upload_pipeline.provider_budgets") == 3


async def test_an_answer_that_cannot_be_used_is_paid_for_and_in_the_books(
    paid: PaidQueries, simulator: OpenAISimulator, admin: asyncpg.Connection, user: UUID, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "_FIRST_DELAY", 0.0)
    simulator.misbehave(Fault.WRONG_DIMENSIONS)
    await paid.embed("hail", user_id=user)
    assert simulator.books.tokens == 2
    assert [(row[0], row[3]) for row in await books(admin)] == [(user, 1), (user, 1)]


async def test_a_long_retry_after_holds_for_all_who_ask(
    paid: PaidQueries, simulator: OpenAISimulator, admin: asyncpg.Connection, user: UUID
) -> None:
    simulator.misbehave(Fault.RATE_LIMITED, retry_after=300)
    with pytest.raises(PipelineError, match="ask again in 300 s"):
        await paid.embed("hail", user_id=user)
    with pytest.raises(PipelineError, match="ask again in"):
        await paid.embed("wind", user_id=user)
    assert simulator.books.requests == 1
    assert await books(admin) == []


async def test_a_refusal_that_tells_no_time_is_waited_for_all_the_same(
    paid: PaidQueries, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[str]] = []

    async def refuse(texts: list[str]) -> None:
        sent.append(texts)
        raise EmbeddingError(ErrorCode.EMBED_FAILED, "too many", remedy=Remedy.WAIT, answered=True)

    monkeypatch.setattr(paid.embedder, "request", refuse)
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    with pytest.raises(PipelineError, match="ask again in 2 s"):
        await paid.embed("hail", user_id=user)
    assert len(sent) == 1


async def test_books_that_cannot_be_written_fail_no_search(
    paid: PaidQueries, admin: asyncpg.Connection, user: UUID
) -> None:
    await admin.execute("alter table upload_pipeline.usage_records rename to usage_records_away")
    assert (await paid.embed("hail", user_id=user)).shape == (1536,)
    await admin.execute("alter table upload_pipeline.usage_records_away rename to usage_records")
    assert await books(admin) == []


async def test_a_search_by_words_costs_nothing(
    simulator: OpenAISimulator, db: BoundedPool, user: UUID, tmp_path: Any
) -> None:
    settings = load_settings(
        home=tmp_path, embedder="openai", openai_api_key=KEY, openai_base_url=simulator.url, openai_model=MODEL
    )
    models = QueryModels(db, ProviderCalls(), settings)
    await models.start()
    await search(db, models, user_id=user, query="hail", mode="text")
    assert simulator.books.requests == 0
    await search(db, models, user_id=user, query="hail", mode="vector")
    assert simulator.books.requests == 1
    await models.close()


async def test_a_local_embedder_is_not_paid(embedder: LocalEmbedder, db: BoundedPool, tmp_path: Any) -> None:
    assert paid_queries(embedder, db, ProviderCalls(), load_settings(home=tmp_path)) is None


async def test_an_operators_own_limit_holds(paid: PaidQueries, simulator: OpenAISimulator, user: UUID) -> None:
    held = replace(paid, request_limit=1)
    await held.embed("hail", user_id=user)
    with pytest.raises(PipelineError, match="rate limit"):
        await held.embed("wind", user_id=user)
    assert simulator.books.requests == 1
