"""A paid model is filled beside the local one: what its server's books say of kills, of giving up, and of faults."""

from __future__ import annotations

import asyncio
import json
import signal
from uuid import UUID, uuid4

import numpy as np
import pytest

from tests.scenarios.paid_world import DIMENSIONS, needed, rows, run_command
from tests.scenarios.test_embedding_cache import long_document
from tests.scenarios.world import World
from tests.simulators.openai_embeddings import Fault, OpenAISimulator, vector_of
from upload_pipeline.providers.embedding import TRIAL_TEXT

PAID = "text-embedding-3-small"
MODEL = f"{PAID}@{DIMENSIONS}"
BATCH = 6
"""Texts in a request, as the simulator's fixture sets it."""

LACKING = f"select lacking_chunks from upload_pipeline.model_overview where model = '{MODEL}'"
OLD_IN_ROWS = f"select from upload_pipeline.document_chunks where embed_model <> '{MODEL}'"


@pytest.fixture
async def owner(world: World, simulator: OpenAISimulator) -> UUID:
    """One of two users of three documents, embedded by the local model: two are the owner's, and much alike."""
    world.environment |= {"UPLOAD_PIPELINE_EMBEDDER": "local", "UPLOAD_PIPELINE_OPENAI_CONCURRENCY": "1"}
    (database,) = await rows(world, "select current_database() as name")
    await rows(world, f"""alter database "{database["name"]}" set upload_pipeline.backoff_base = '300 milliseconds'""")
    owner, files = uuid4(), world.home / "files"
    first, second = long_document(files / "a.md", sections=8), long_document(files / "b.md", sections=10)
    await world.ingest([(first, owner), (second, owner), (first, uuid4())])
    world.start_worker()
    assert await world.until_ended(120) == {"done": 3}
    assert simulator.books.requests == 0
    return owner


async def until(world: World, query: str, expected: int) -> None:
    async with asyncio.timeout(120):
        while [tuple(row) for row in await rows(world, query)] != [(expected,)]:
            await asyncio.sleep(0.05)


async def test_a_paid_model_is_filled_within_its_budget_and_a_kill_costs_what_was_on_its_way(
    world: World, simulator: OpenAISimulator, owner: UUID
) -> None:
    added = await run_command(world, "models", "add", PAID, "--dimensions", str(DIMENSIONS), "--paused")
    assert added.returncode == 0, added.stderr
    assert sum(simulator.books.paid.values()) == 1, "the text that it was tried with"
    simulator.books.paid.clear()
    tried = simulator.books.requests

    simulator.latency = 0.4
    simulator.misbehave(Fault.RATE_LIMITED, retry_after=0.3)
    simulator.misbehave(Fault.SERVER_ERROR)
    await rows(world, f"select upload_pipeline.pause_model('{MODEL}', false)")
    async with asyncio.timeout(60):
        while not await rows(world, "select from upload_pipeline.embedding_cache"):
            await asyncio.sleep(0.01)
    (victim,) = world.workers
    victim.send_signal(signal.SIGKILL)
    await asyncio.to_thread(victim.wait)
    (kept,) = await rows(world, "select count(*) as n from upload_pipeline.embedding_cache")
    assert 0 < kept["n"] < sum((await needed(world)).values())

    await world.ingest([(long_document(world.home / "files" / "c.md", sections=3, first=100), owner)])
    world.start_worker()
    await until(world, LACKING, 0)
    assert (await world.until_ended(120)).keys() == {"done"}

    # paid for: each user's texts, and answers that the killed worker may have had on their way into the database
    texts, books = await needed(world), simulator.books
    assert set(books.paid) == set(texts)
    again = {text: times - texts[text] - books.lost[text] for text, times in books.paid.items()}
    assert all(times >= 0 for times in again.values())
    assert sum(again.values()) <= 2 * BATCH
    (told,) = await rows(
        world,
        f"""
        select sum(tokens)::int as tokens, sum(cached)::int as cached from upload_pipeline.usage_records
         where model = '{PAID}' and operation = 'embed'
        """,
    )
    chunks = await rows(world, "select text from upload_pipeline.document_chunks where live")
    assert told["cached"] >= len(chunks) - sum(texts.values()), "a text twice in documents of one user"
    assert 0 < told["tokens"] <= books.tokens

    # reserved: each request before it was made, by limits that the answers told
    assert books.over_limit == 0
    assert books.faults == {"rate_limited": 1, "server_error": 1}
    (budget,) = await rows(world, f"select * from upload_pipeline.provider_budgets where model = '{PAID}'")
    assert budget["request_limit"] == simulator.requests_per_minute
    assert budget["granted_calls"] >= books.requests - tried
    assert budget["frozen_until"] is not None

    paid = books.paid.copy()
    await rows(world, f"select upload_pipeline.activate_model('{MODEL}', '1 day')")
    async with asyncio.timeout(60):
        while await rows(world, OLD_IN_ROWS):
            await asyncio.sleep(0.05)
    for row in await rows(world, "select text, embedding::text from upload_pipeline.document_chunks where live"):
        stored = np.array(json.loads(row["embedding"]))
        np.testing.assert_allclose(stored, vector_of(row["text"], DIMENSIONS), rtol=1e-4, atol=1e-6)
    assert books.paid == paid, "an activation costs nothing"


async def test_a_worker_without_the_key_claims_no_second_document_and_one_that_has_it_serves_all(
    world: World, simulator: OpenAISimulator
) -> None:
    key = world.environment.pop("UPLOAD_PIPELINE_OPENAI_API_KEY")
    world.environment |= {"UPLOAD_PIPELINE_EMBEDDER": "local", "UPLOAD_PIPELINE_WORKER_CONCURRENCY": "1"}
    world.start_worker()
    async with asyncio.timeout(60):
        while not (keyless := await rows(world, "select worker_id from upload_pipeline.workers")):
            await asyncio.sleep(0.05)
    await rows(world, f"select upload_pipeline.add_model('{MODEL}', 'openai', {DIMENSIONS})")
    await rows(world, f"select upload_pipeline.activate_model('{MODEL}', '1 day')")
    files = world.home / "files"
    await world.ingest([(long_document(files / "a.md", sections=2), uuid4())])
    await until(
        world, "select count(*) from upload_pipeline.upload_jobs where state = 'queued' and stage like 'embedding%'", 1
    )
    await world.ingest([(long_document(files / "b.md", sections=2, first=50), uuid4())])
    world.environment["UPLOAD_PIPELINE_OPENAI_API_KEY"] = key
    world.start_worker()
    assert await world.until_ended(120) == {"done": 2}
    claims = f"""
        select count(distinct job_id) as jobs, count(*) as n from upload_pipeline.events
         where code = 'job_claimed' and worker_id = '{keyless[0]["worker_id"]}'
    """
    assert [tuple(row) for row in await rows(world, claims)] == [(1, 1)]


async def test_a_paid_model_that_is_given_up_costs_no_more_and_taken_up_again_nothing_twice(
    world: World, simulator: OpenAISimulator, owner: UUID
) -> None:
    simulator.latency = 0.4
    add = f"select upload_pipeline.add_model('{MODEL}', 'openai', {DIMENSIONS})"
    await rows(world, add)
    async with asyncio.timeout(60):
        while simulator.books.answered < 2:
            await asyncio.sleep(0.01)
    assert await rows(world, "select from upload_pipeline.upload_jobs where pipeline = 'reembed' and state = 'working'")
    await rows(world, f"select upload_pipeline.retire_model('{MODEL}')")
    assert (await world.until_ended(120)).keys() <= {"done", "cancelled"}
    assert simulator.books.paid <= await needed(world), "what was under way comes to its end, once"

    await rows(world, add)
    await until(world, LACKING, 0)
    assert simulator.books.paid == await needed(world)
    assert owner in {row["user_id"] for row in await rows(world, "select user_id from upload_pipeline.usage_records")}


async def test_a_provider_that_is_away_for_a_while_costs_the_filling_no_document_and_uploads_no_wait(
    world: World, simulator: OpenAISimulator, owner: UUID
) -> None:
    simulator.faults = {Fault.SERVER_ERROR: 1.0}
    await rows(world, f"select upload_pipeline.add_model('{MODEL}', 'openai', {DIMENSIONS})")
    async with asyncio.timeout(60):
        while not (told := await rows(world, "select failure from upload_pipeline.model_overview where failure <> ''")):
            await asyncio.sleep(0.05)
    assert "failed (500)" in told[0]["failure"]
    status = await run_command(world, "models", "status")
    assert "its provider failed at" in status.stdout + status.stderr

    await world.ingest([(long_document(world.home / "files" / "c.md", sections=3, first=100), owner)])
    await until(world, "select count(*) from upload_pipeline.documents where searchable_at is not null", 4)

    simulator.behave()
    await until(world, LACKING, 0)
    assert (await world.until_ended(120)).keys() == {"done"}
    assert await rows(world, "select from upload_pipeline.events where code = 'job_deadlettered'") == []
    paid = simulator.books.paid.copy()
    del paid[TRIAL_TEXT]  # where the provider comes back between a text that failed and the trial
    assert paid == await needed(world)
