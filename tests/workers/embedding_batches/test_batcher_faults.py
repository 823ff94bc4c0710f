"""What each fault of provider or database does to the jobs, and to the books."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import pytest
from embedding_bench import Bench, a_job, texts

from tests.simulators.openai_embeddings import Fault
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_workers import embedding_batcher, vector_keeping


async def test_a_server_that_tells_its_tokens_oddly_gives_its_vectors_all_the_same(
    bench: Bench, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = bench.simulator.vectors
    monkeypatch.setattr(
        bench.simulator, "vectors", lambda body, inputs, counted, fault: given(body, inputs, "9", fault)
    )
    async with asyncio.timeout(20):
        assert await bench.embed(texts(3)) == texts(3)
        while not await admin.fetchval("select tokens > 0 from upload_pipeline.usage_records"):
            await asyncio.sleep(0.01)


async def test_an_answer_that_cannot_be_written_fails_the_jobs_and_nobody_is_told_of_it(
    bench: Bench, admin: asyncpg.Connection
) -> None:
    await admin.execute("alter table upload_pipeline.embedding_cache rename to embedding_cache_away")
    with pytest.raises(asyncpg.UndefinedTableError):
        await bench.embed(texts(3))
    assert bench.got == {}
    await admin.execute("alter table upload_pipeline.embedding_cache_away rename to embedding_cache")
    assert await bench.embed(texts(3)) == texts(3)


@pytest.mark.parametrize("write", ["keep_vectors", "record_usage"])
async def test_a_database_that_is_away_for_a_moment_costs_nothing(
    bench: Bench, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    monkeypatch.setattr(vector_keeping, "_DELAY", 0.01)
    kept = getattr(vector_keeping, write)
    tries = []

    async def lame(*arguments: Any, **options: Any) -> int:
        tries.append(1)
        if len(tries) < vector_keeping.TRIES:
            raise ConnectionRefusedError
        return int(await kept(*arguments, **options))

    monkeypatch.setattr(vector_keeping, write, lame)
    assert await bench.embed(texts(3)) == texts(3)
    await bench.batcher.close()
    assert len(tries) == vector_keeping.TRIES
    assert bench.simulator.books.paid_again() == {}
    assert await admin.fetchval("select sum(tokens) from upload_pipeline.usage_records") == bench.simulator.books.tokens


@pytest.mark.parametrize("fault", [Fault.REJECTED, Fault.NAN])
async def test_a_poison_text_fails_its_own_job_only_and_the_rest_is_paid_once(bench: Bench, fault: Fault) -> None:
    bench.simulator.poison["venom"] = fault
    ill = Bench(bench.simulator, bench.batcher)
    good, bad = await asyncio.gather(
        bench.embed(texts(50)), ill.embed([*texts(20, "ill"), "venom"]), return_exceptions=True
    )
    assert good == texts(50)
    assert isinstance(bad, PipelineError)
    assert bad.code is ErrorCode.EMBED_REJECTED
    assert len(ill.got) == 20
    assert bench.simulator.books.paid_again() == {}


async def test_a_text_that_brings_the_server_down_takes_others_with_it_only_once(bench: Bench) -> None:
    bench.simulator.poison["venom"] = Fault.SERVER_ERROR
    first = await asyncio.gather(bench.embed(texts(5)), bench.embed(["venom"]), return_exceptions=True)
    assert all(isinstance(error, PipelineError) and error.code is ErrorCode.EMBED_FAILED for error in first)
    again = await asyncio.gather(
        bench.embed(texts(5), a_job(retries=1)), bench.embed(["venom"], a_job(retries=1)), return_exceptions=True
    )
    assert again[0] == texts(5)
    assert isinstance(again[1], PipelineError)


@pytest.mark.parametrize(
    "fault",
    [Fault.SERVER_ERROR, Fault.DROPPED, Fault.TRUNCATED, Fault.WRONG_INDEX, Fault.SHORT, Fault.EMPTY, Fault.SHUFFLED],
)
async def test_what_passes_is_sent_again_and_nothing_else_is(bench: Bench, fault: Fault) -> None:
    bench.simulator.misbehave(fault)
    assert await bench.embed(texts(10)) == texts(10)
    assert bench.simulator.books.paid_again() == {}


@pytest.mark.parametrize(
    ("fault", "told"), [(Fault.WRONG_DIMENSIONS, True), (Fault.NAN, True), (Fault.TRUNCATED, False)]
)
async def test_an_answer_that_cannot_be_used_is_paid_for_and_in_the_books(
    bench: Bench, admin: asyncpg.Connection, fault: Fault, told: bool
) -> None:
    bench.simulator.misbehave(fault)
    assert await bench.embed(texts(3)) == texts(3)
    await bench.batcher.close()
    row = await admin.fetchrow(
        "select sum(requests) as requests, sum(tokens) as tokens from upload_pipeline.usage_records"
    )
    assert row["requests"] == bench.simulator.books.requests == 2
    # of half an answer only the bound is known
    assert row["tokens"] == bench.simulator.books.tokens if told else row["tokens"] > bench.simulator.books.tokens


async def test_a_hanging_request_is_given_up_in_time(bench: Bench) -> None:
    bench.simulator.misbehave(Fault.HANG)
    began = time.monotonic()
    assert await bench.embed(texts(3)) == texts(3)
    assert 2.0 <= time.monotonic() - began < 30


async def test_what_does_not_pass_fails_the_job_so_that_it_is_tried_again(bench: Bench) -> None:
    bench.simulator.misbehave(Fault.SERVER_ERROR, times=20)
    with pytest.raises(PipelineError) as caught:
        await bench.embed(texts(3))
    assert caught.value.retryable
    assert bench.simulator.books.requests == embedding_batcher.TRIES


async def test_a_database_that_is_away_fails_the_job_and_pays_nothing(bench: Bench) -> None:
    class Away:
        async def fetchrow(self, query: str, *args: Any) -> Any:
            raise ConnectionRefusedError

    bench.batcher._requests.db = Away()  # type: ignore[assignment]
    with pytest.raises(ConnectionRefusedError):
        await bench.embed(texts(3))
    assert bench.simulator.books.requests == 0
