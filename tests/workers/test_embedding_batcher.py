"""The batcher against the simulator and a real budget: what is sent, what each job is given, what each fault does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

from tests.simulators.openai_embeddings import KEY, Fault, OpenAISimulator, vector_of
from upload_pipeline.database.embedding_models import register_model
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.queue import ClaimedJob, Lease
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.openai_embedder import OpenAIEmbedder
from upload_pipeline.settings import load_settings
from upload_workers import embedding_batcher, vector_keeping
from upload_workers.embedding_batcher import EmbeddingBatcher
from upload_workers.embedding_line import PutOff

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


@pytest.fixture
async def db(database: Any) -> AsyncIterator[Any]:
    pool = await open_pool(database.worker_url, size=5)
    await register_model(pool, model="text-embedding-3-small@16", provider="openai", dimensions=16)
    yield pool
    await pool.close()


@pytest.fixture(autouse=True)
def brisk_batcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_batcher, "_FIRST_DELAY", 0.01)


OpenBench = Callable[..., Bench]


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


@pytest.fixture
async def simulator() -> AsyncIterator[OpenAISimulator]:
    async with OpenAISimulator() as simulator:
        yield simulator


@pytest.fixture
async def bench(simulator: OpenAISimulator, open_bench: OpenBench) -> Bench:
    return open_bench(simulator)


def texts(count: int, word: str = "text") -> list[str]:
    return [f"{word} {number}" for number in range(count)]


async def alarms(admin: asyncpg.Connection) -> list[str]:
    rows = await admin.fetch(
        "select payload ->> 'code' as code from upload_pipeline.events where code = 'provider_paused'"
    )
    return [row["code"] for row in rows]


async def test_texts_of_all_jobs_share_requests_and_each_job_gets_its_own(bench: Bench) -> None:
    jobs = [texts(40, f"job {number}") for number in range(20)]
    answers = await asyncio.gather(*(bench.embed(of_one) for of_one in jobs))
    assert answers == jobs
    books = bench.simulator.books
    assert books.requests <= 5
    assert books.largest_inputs == 256
    assert books.paid_again() == {}


async def test_a_request_may_hold_as_many_texts_as_the_provider_takes(open_bench: OpenBench) -> None:
    most = load_settings(embed_batch_size=2048).embed_batch_size
    with pytest.raises(PipelineError, match="EMBED_BATCH_SIZE"):
        load_settings(embed_batch_size=2049)
    async with OpenAISimulator() as simulator:
        bench = open_bench(simulator, most=most)
        assert len(await bench.embed(texts(2100))) == 2100
        assert (simulator.books.requests, simulator.books.largest_inputs, simulator.books.too_large) == (2, 2048, 0)


async def test_requests_are_in_flight_together_but_no_more_than_allowed(open_bench: OpenBench) -> None:
    async with OpenAISimulator(latency=0.05) as simulator:
        bench = open_bench(simulator, most=10, concurrency=3)
        await bench.embed(texts(10))  # the first finds the limits out, alone
        await bench.embed(texts(120, "more"))
        assert simulator.books.most_in_flight == 3


async def test_the_same_text_of_a_user_is_paid_once_and_another_users_apart(bench: Bench) -> None:
    other = uuid4()
    await asyncio.gather(
        bench.embed(["same", "same", "own"]), bench.embed(["same"]), bench.embed(["same"], a_job(other))
    )
    assert bench.simulator.books.paid == {"same": 2, "own": 1}


async def test_each_job_has_its_share_of_what_was_used(bench: Bench, admin: asyncpg.Connection) -> None:
    jobs = [a_job() for _ in range(3)]
    await asyncio.gather(
        bench.embed(["one two three four", "shared"], jobs[0]),
        bench.embed(["shared"], jobs[1]),
        bench.embed(["five six"], jobs[2]),
    )
    async with asyncio.timeout(5):
        while not (rows := await admin.fetch("select * from upload_pipeline.usage_records")):
            await asyncio.sleep(0.01)
    used = {row["job_id"]: row for row in rows}
    assert sum(row["tokens"] for row in rows) == bench.simulator.books.tokens == 7
    assert sum(row["requests"] for row in rows) == 1
    assert used[jobs[1].job_id]["tokens"] == 0
    assert [used[job.job_id]["cached"] for job in jobs] == [0, 1, 0]
    assert used[jobs[0].job_id]["tokens"] > used[jobs[2].job_id]["tokens"] > 0
    assert all(row["cost_micros"] is not None for row in rows)


async def test_a_job_that_goes_away_pays_for_its_texts_and_its_company_does_not(
    open_bench: OpenBench, admin: asyncpg.Connection
) -> None:
    async with OpenAISimulator(latency=0.3) as simulator:
        bench = open_bench(simulator)
        gone, stays = a_job(), a_job(uuid4())
        asked = [asyncio.create_task(bench.embed([f"{word} a b c d e f g" for word in "xyz"], gone))]
        asked.append(asyncio.create_task(Bench(simulator, bench.batcher).embed(["one"], stays)))
        while not simulator._in_flight:
            await asyncio.sleep(0.01)
        asked[0].cancel()
        await asyncio.wait(asked)
        await bench.batcher.close()
        assert (simulator.books.requests, simulator.books.tokens) == (1, 25)
    rows = await admin.fetch("select job_id, user_id, tokens from upload_pipeline.usage_records order by tokens")
    assert [(row["job_id"], row["user_id"]) for row in rows] == [
        (stays.job_id, stays.user_id),
        (gone.job_id, gone.user_id),
    ]
    assert rows[0]["tokens"] <= 2
    assert sum(row["tokens"] for row in rows) == 25


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


async def test_what_is_under_way_when_the_worker_ends_is_kept(open_bench: OpenBench, admin: asyncpg.Connection) -> None:
    await admin.execute("insert into upload_pipeline.lanes (pool, user_id) values ('default', $1)", USER)
    async with OpenAISimulator(latency=0.3) as simulator:
        bench = open_bench(simulator)
        asked = asyncio.create_task(bench.embed(texts(3)))
        while not simulator._in_flight:
            await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.wait([asked])
        await bench.batcher.close()
        assert len(simulator.books.paid) == 3
        assert await admin.fetchval("select count(*) from upload_pipeline.embedding_cache") == 3


async def test_what_others_brought_since_the_look_into_the_cache_is_not_sent_again(bench: Bench) -> None:
    looked_at = time.monotonic()
    await bench.embed(["shared", "own"])
    late = bench.batcher.embed(a_job(), ["shared", "new"], until=time.monotonic() + 60, looked_at=looked_at)
    assert [positions async for positions, _ in late] == [[1]]
    again = bench.batcher.embed(a_job(), ["shared"], until=time.monotonic() + 60, looked_at=time.monotonic())
    assert [positions async for positions, _ in again] == [[0]]
    assert bench.simulator.books.paid == {"shared": 2, "own": 1, "new": 1}


async def test_what_is_being_written_holds_no_place_among_the_requests_but_bounds_them(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    kept = vector_keeping.keep_vectors

    async def slow(*arguments: Any, **options: Any) -> int:
        await gate.wait()
        return await kept(*arguments, **options)

    async with OpenAISimulator() as simulator:
        bench = open_bench(simulator, most=10, concurrency=2)
        await bench.embed(texts(1, "warm"))
        monkeypatch.setattr(vector_keeping, "keep_vectors", slow)
        asked = asyncio.create_task(bench.embed(texts(100)))
        for _ in range(50):
            await asyncio.sleep(0.01)
        assert 1 + 2 <= simulator.books.answered <= 1 + 5
        gate.set()
        assert await asked == texts(100)
        assert simulator.books.most_in_flight <= 2


async def test_nothing_to_embed_is_nothing_to_wait_for(bench: Bench) -> None:
    assert await bench.embed([]) == []
    assert bench.simulator.books.requests == 0


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


async def test_what_has_its_budget_already_is_not_sent_once_a_limit_was_met(open_bench: OpenBench) -> None:
    async with OpenAISimulator(latency=0.05) as simulator:
        bench = open_bench(simulator, most=10, concurrency=1)
        await bench.embed(texts(1, "warm"))
        simulator.misbehave(Fault.RATE_LIMITED, retry_after=300)
        with pytest.raises(PutOff):
            await bench.embed(texts(30))
        assert simulator.books.requests == 2


async def test_a_short_limit_is_waited_for_and_a_long_one_puts_the_jobs_of_all_workers_off(
    bench: Bench, open_bench: OpenBench
) -> None:
    bench.simulator.misbehave(Fault.RATE_LIMITED, retry_after=0.3)
    assert await bench.embed(texts(3)) == texts(3)

    bench.simulator.misbehave(Fault.RATE_LIMITED, retry_after=300)
    began = time.monotonic()
    with pytest.raises(PutOff) as caught:
        await bench.embed(texts(3, "more"))
    assert 290 < caught.value.seconds < 335
    sent = bench.simulator.books.requests
    beside = open_bench(bench.simulator)
    for one in (bench, beside):
        with pytest.raises(PutOff) as caught:
            await one.embed(texts(3, "more"))
        assert 290 < caught.value.seconds < 335
    assert bench.simulator.books.requests == sent
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("fault", "code"), [(Fault.QUOTA, "EMBED_QUOTA"), (Fault.UNAUTHORISED, "EMBED_DENIED")])
async def test_an_empty_account_pauses_all_workers_with_one_alarm(
    bench: Bench, open_bench: OpenBench, admin: asyncpg.Connection, fault: Fault, code: str
) -> None:
    beside = open_bench(bench.simulator)
    await bench.embed(["warm"])
    bench.simulator.misbehave(fault, times=100)
    told = await asyncio.gather(
        *(one.embed(texts(3, f"{number}")) for number in range(5) for one in (bench, beside)), return_exceptions=True
    )
    assert all(isinstance(error, PutOff) and 590 < error.seconds < 665 for error in told)
    assert await alarms(admin) == [code]
    sent = bench.simulator.books.requests
    assert sent <= 3
    with pytest.raises(PutOff):
        await bench.embed(texts(3))
    assert bench.simulator.books.requests == sent


async def test_limits_of_a_minute_are_never_exceeded_by_workers_together(open_bench: OpenBench) -> None:
    async with OpenAISimulator(requests_per_minute=6, tokens_per_minute=400) as simulator:
        benches = [open_bench(simulator, most=10) for _ in range(3)]
        done = await asyncio.gather(
            *(one.embed(texts(30, f"w{number}"), seconds=5) for number, one in enumerate(benches)),
            return_exceptions=True,
        )
        assert simulator.books.over_limit == 0
        assert all(isinstance(answer, list | PutOff) for answer in done)
        assert simulator.books.answered >= 3


async def test_a_request_larger_than_a_minute_goes_in_parts(open_bench: OpenBench) -> None:
    async with OpenAISimulator(tokens_per_minute=500) as simulator:
        bench = open_bench(simulator)
        await bench.embed(["warm"])
        with pytest.raises(PutOff):
            await bench.embed(texts(250), seconds=3)
        assert 0 < len(bench.got) < 250
        assert simulator.books.over_limit == simulator.books.too_large == 0


async def test_a_limit_that_only_a_refusal_tells_is_kept_from_then_on(
    open_bench: OpenBench, admin: asyncpg.Connection
) -> None:
    async with OpenAISimulator(tokens_per_minute=500, tells_too_large=True) as simulator:
        bench = open_bench(simulator)
        with pytest.raises(PutOff) as caught:
            await bench.embed(texts(300), seconds=3)
        assert 0 < len(bench.got) < 300
        assert caught.value.seconds < 120
        assert (simulator.books.over_limit, simulator.books.paid_again()) == (1, {})
        # what was refused for its size fills no minute
        counted = "select max(tokens) from upload_pipeline.provider_reservations where settled_at is not null"
        assert await admin.fetchval(counted) <= 500


async def test_a_text_larger_than_a_minute_fails_its_own_job_with_limit_and_remedy(open_bench: OpenBench) -> None:
    async with OpenAISimulator(tokens_per_minute=100, tells_too_large=True) as simulator:
        bench = open_bench(simulator)
        others = Bench(simulator, bench.batcher)
        long, short = await asyncio.gather(bench.embed(["word " * 101]), others.embed(texts(5)), return_exceptions=True)
        assert isinstance(long, PipelineError)
        assert (long.code, long.retryable) == (ErrorCode.REQUEST_OVER_BUDGET, False)
        assert "takes 100 tokens in a minute, and one request asked for 101" in long.message
        assert "UPLOAD_PIPELINE_CHUNK_TARGET_CHARS" in long.message
        assert "ask the provider for a higher limit" in long.message
        assert short == texts(5)
        assert simulator.books.over_limit == 2


async def test_a_job_that_goes_away_leaves_the_line_and_the_others_get_theirs(open_bench: OpenBench) -> None:
    async with OpenAISimulator(latency=0.2) as simulator:
        bench = open_bench(simulator, most=10, concurrency=1)
        gone = asyncio.create_task(bench.embed(texts(100, "gone")))
        await asyncio.sleep(0.1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await bench.embed(texts(10)) == texts(10)
        assert simulator.books.requests <= 3


async def test_what_is_in_line_when_time_is_up_is_put_off_and_what_is_under_way_arrives(open_bench: OpenBench) -> None:
    async with OpenAISimulator(latency=0.4) as simulator:
        bench = open_bench(simulator, most=10, concurrency=1)
        with pytest.raises(PutOff):
            await bench.embed(texts(100), seconds=0.6)
        assert 10 <= len(bench.got) < 100
        assert len(simulator.books.paid) == len(bench.got)


async def test_a_provider_that_refuses_again_and_again_holds_no_job_beyond_its_time(bench: Bench) -> None:
    await bench.embed(["warm"])
    bench.simulator.misbehave(Fault.RATE_LIMITED, times=10_000, retry_after=0.05)
    began = time.monotonic()
    async with asyncio.timeout(30):
        with pytest.raises(PutOff):
            await bench.embed(texts(3), seconds=0.5)
    assert time.monotonic() - began >= 0.5
    bench.simulator.behave()
    assert await bench.embed(texts(3)) == texts(3)


async def test_a_database_that_is_away_fails_the_job_and_pays_nothing(bench: Bench) -> None:
    class Away:
        async def fetchrow(self, query: str, *args: Any) -> Any:
            raise ConnectionRefusedError

    bench.batcher._requests.db = Away()  # type: ignore[assignment]
    with pytest.raises(ConnectionRefusedError):
        await bench.embed(texts(3))
    assert bench.simulator.books.requests == 0
