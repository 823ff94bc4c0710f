"""The provider's limits: kept by all workers together, waited for, or told to the jobs."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest
from embedding_bench import Bench, OpenBench, texts

from tests.simulators.openai_embeddings import Fault, OpenAISimulator
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_workers.embedding_line import PutOff


async def alarms(admin: asyncpg.Connection) -> list[str]:
    rows = await admin.fetch(
        "select payload ->> 'code' as code from upload_pipeline.events where code = 'provider_paused'"
    )
    return [row["code"] for row in rows]


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


async def test_requests_that_fail_fill_the_minute_too(open_bench: OpenBench) -> None:
    """Whether the provider counts them is said nowhere, and no good answer comes that tells what remains."""
    async with OpenAISimulator(requests_per_minute=6, counts_failed=True) as simulator:
        benches = [open_bench(simulator, most=10) for _ in range(3)]
        await benches[0].embed(["warm"])
        simulator.misbehave("server_error", times=100)
        told = await asyncio.gather(
            *(one.embed(texts(30, f"w{number}"), seconds=5) for number, one in enumerate(benches)),
            return_exceptions=True,
        )
        assert all(isinstance(error, PutOff | PipelineError) for error in told)
        assert any(isinstance(error, PutOff) for error in told)
        assert simulator.books.over_limit == 0
        assert simulator.busiest_minute == 6


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
