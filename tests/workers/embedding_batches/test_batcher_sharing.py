"""Jobs share requests: what is sent, what each is given and pays, and what becomes of those that go away."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from embedding_bench import USER, Bench, OpenBench, a_job, texts

from tests.simulators.openai_embeddings import OpenAISimulator
from upload_pipeline.database import provider_budget
from upload_pipeline.errors import PipelineError
from upload_pipeline.settings import load_settings
from upload_workers import vector_keeping
from upload_workers.embedding_line import Line, PutOff


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


async def test_texts_of_many_tokens_share_a_request_below_the_providers_limit(bench: Bench) -> None:
    # of such texts the bound is what the server counts
    jobs = [[f"{number} {place:03}" + "!" * 5000 for place in range(31)] for number in range(2)]
    assert await asyncio.gather(*(bench.embed(of_one) for of_one in jobs)) == jobs
    books = bench.simulator.books
    assert (books.requests, books.too_large) == (2, 0)
    assert 280_000 < books.largest_tokens < 300_000


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


async def test_a_text_that_is_under_way_is_not_sent_again_for_a_job_that_goes_by_itself(open_bench: OpenBench) -> None:
    async with OpenAISimulator(latency=0.3) as simulator:
        bench = open_bench(simulator)
        first = asyncio.create_task(bench.embed(["slow"]))
        while not simulator._in_flight:
            await asyncio.sleep(0.01)
        again = a_job(retries=1)
        assert await bench.embed(["slow", "own"], again) == ["slow", "own"]
        assert await first == ["slow"]
        assert simulator.books.paid == {"slow": 1, "own": 1}


def test_a_job_that_goes_by_itself_does_so_also_where_the_request_that_it_waited_for_is_sent_again() -> None:
    line, again = Line(), a_job(retries=1)
    line.join(a_job(), ["text", "other"])
    sent = line.take(10, 1000)
    line.join(again, ["text"])
    assert line.take(10, 1000) == []
    for item in sent:
        item.tries += 1
    line.put_back(sent)
    parts = [line.take(10, 1000), line.take(10, 1000), line.take(10, 1000)]
    assert [[(item.text, item.company) for item in part] for part in parts] == [
        [("text", None), ("other", None)],
        [("text", again.job_id)],
        [],
    ]
    assert [len(item.waiting) for part in parts for item in part] == [1, 1, 1]


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


@pytest.mark.parametrize("retries", [(1, 0), (0, 1), (1, 1)])
async def test_a_text_of_jobs_that_keep_apart_is_paid_once_where_both_stand_in_line(
    open_bench: OpenBench, retries: tuple[int, int]
) -> None:
    """As after a crash: two documents of a user share a page, and one of them, or each, was at work before."""
    async with OpenAISimulator(latency=0.2) as simulator:
        bench = open_bench(simulator, concurrency=1)
        await bench.embed(["warm"])
        holding = asyncio.create_task(bench.embed(["first"]))
        while not simulator._in_flight:
            await asyncio.sleep(0.01)
        jobs = [a_job(retries=count) for count in retries]
        others = [Bench(simulator, bench.batcher) for _ in jobs]
        asked = [
            asyncio.create_task(other.embed(["shared", f"own {number}"], job))
            for number, (other, job) in enumerate(zip(others, jobs, strict=True))
        ]
        assert await asyncio.gather(*asked) == [["shared", "own 0"], ["shared", "own 1"]]
        assert await holding == ["first"]
        assert simulator.books.paid == {"warm": 1, "first": 1, "shared": 1, "own 0": 1, "own 1": 1}


def test_texts_that_went_out_together_and_failed_go_apart_and_have_no_more_tries_for_it() -> None:
    line, jobs = Line(), [a_job(retries=1), a_job(retries=1)]
    for job in jobs:
        line.join(job, ["text"])
    sent = line.take(1, 1000)
    assert line.take(1, 1000) == []
    assert len(sent[0].waiting) == 2
    for tries in (1, 2, 3):
        for item in sent:
            item.tries += 1
        line.put_back(sent)
        sent = line.take(1, 1000) + line.take(1, 1000)
        assert {item.company for item in sent} == {job.job_id for job in jobs}
        assert [(item.tries, len(item.waiting)) for item in sent] == [(tries, 1), (tries, 1)]


async def test_a_worker_that_stops_sends_no_more_and_waits_for_what_is_under_way(
    open_bench: OpenBench, admin: asyncpg.Connection
) -> None:
    await admin.execute("insert into upload_pipeline.lanes (pool, user_id) values ('default', $1)", USER)
    async with OpenAISimulator(latency=0.3) as simulator:
        bench = open_bench(simulator, most=10, concurrency=1)
        await bench.embed(["warm"])
        asked = asyncio.create_task(bench.embed(texts(50)))
        while not simulator._in_flight:
            await asyncio.sleep(0.01)
        bench.batcher.send_no_more()
        with pytest.raises(PutOff):
            await asked
        assert len(bench.got) == 10
        with pytest.raises(PutOff):
            await bench.embed(["late"])
        bench.batcher.send_no_more()
        await bench.batcher.close()
        assert len(simulator.books.paid) == 1 + 10
        assert await admin.fetchval("select count(*) from upload_pipeline.embedding_cache") == 1 + 10


async def test_the_books_do_not_wait_for_the_budget(
    open_bench: OpenBench, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = asyncio.Event()

    async def never(*_arguments: Any, **_options: Any) -> None:
        await told.wait()

    async with OpenAISimulator() as simulator:
        bench = open_bench(simulator)
        monkeypatch.setattr(provider_budget, "settle", never)
        asked = asyncio.create_task(bench.embed(["paid"]))
        for _ in range(200):
            if await admin.fetchval("select count(*) from upload_pipeline.usage_records"):
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("what was paid for is not in the books while the budget is away")
        told.set()
        assert await asked == ["paid"]


async def test_nothing_to_embed_is_nothing_to_wait_for(bench: Bench) -> None:
    assert await bench.embed([]) == []
    assert bench.simulator.books.requests == 0


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
