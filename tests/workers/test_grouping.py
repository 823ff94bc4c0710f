"""Transitions that share a statement, and what becomes of each when something is wrong with one or with all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from probe_world import PIPELINE, ProbeWorld

from upload_pipeline.database import queue
from upload_pipeline.database.queue import Advance, ClaimedJob, Executor, Lease
from upload_workers.grouping import GroupedAdvances

TTL = timedelta(seconds=60)


class Counting:
    """A database that counts statements, and fails or waits when told."""

    def __init__(self, db: Executor) -> None:
        self._db = db
        self.statements: list[int] = []
        self.raises: list[BaseException] = []
        self.loses_answers = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        self.statements.append(len(args[0]))
        await self.gate.wait()
        if self.raises:
            raise self.raises.pop(0)
        rows = await self._db.fetch(query, *args)
        if self.loses_answers:
            raise ConnectionResetError("the answer was lost")
        return rows

    async def fetchrow(self, query: str, *args: Any) -> Any:
        pytest.fail("a group is one statement of rows")

    async def fetchval(self, query: str, *args: Any) -> Any:
        pytest.fail("a group is one statement of rows")


@pytest.fixture
async def pool(world: ProbeWorld) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(world.worker_url, min_size=1, max_size=4) as pool:
        yield pool


async def claimed(world: ProbeWorld, pool: asyncpg.Pool, count: int) -> list[ClaimedJob]:
    await world.enqueue(count)
    return await queue.claim_jobs(pool, worker_id=uuid4(), pool="default", limit=count, after_user=None, ttl=TTL)


def step_of(job: ClaimedJob, to: str = "second", *, token: int | None = None) -> Advance:
    return Advance(Lease(job.job_id, job.lease.token if token is None else token), "first", to, True)


async def test_what_is_asked_for_together_is_one_statement(world: ProbeWorld, pool: asyncpg.Pool) -> None:
    db = Counting(pool)
    group = GroupedAdvances(db, TTL, window=0.02)
    jobs = await claimed(world, pool, 20)
    answers = await asyncio.gather(*(group.advance(step_of(job)) for job in jobs))
    assert db.statements == [20]
    assert [(answer.job_id, answer.stage, answer.state) for answer in answers if answer] == [
        (job.job_id, "second", "working") for job in jobs
    ]


async def test_what_is_asked_for_during_a_statement_goes_with_the_next(world: ProbeWorld, pool: asyncpg.Pool) -> None:
    db = Counting(pool)
    group = GroupedAdvances(db, TTL, window=0.0)
    jobs = await claimed(world, pool, 5)
    db.gate.clear()
    first = asyncio.create_task(group.advance(step_of(jobs[0])))
    while not db.statements:
        await asyncio.sleep(0)
    rest = [asyncio.create_task(group.advance(step_of(job))) for job in jobs[1:]]
    await asyncio.sleep(0)
    db.gate.set()
    assert all(await asyncio.gather(first, *rest))
    assert db.statements == [1, 4]


async def test_stale_member_is_told_so_alone(world: ProbeWorld, pool: asyncpg.Pool) -> None:
    group = GroupedAdvances(pool, TTL, window=0.02)
    stale, good = await claimed(world, pool, 2)
    answers = await asyncio.gather(group.advance(step_of(stale, token=0)), group.advance(step_of(good)))
    assert answers[0] is None
    assert answers[1] is not None
    assert answers[1].stage == "second"
    assert (await world.job(stale.job_id))["stage"] == "first"


async def test_member_with_a_wrong_stage_fails_alone(world: ProbeWorld, pool: asyncpg.Pool) -> None:
    group = GroupedAdvances(pool, TTL, window=0.02)
    bad, good, other = await claimed(world, pool, 3)
    answers = await asyncio.gather(
        group.advance(step_of(good)),
        group.advance(step_of(bad, to="end")),
        group.advance(step_of(other)),
        return_exceptions=True,
    )
    assert isinstance(answers[1], asyncpg.PostgresError)
    assert answers[1].sqlstate == queue.INVALID_STAGE
    assert [(await world.job(job.job_id))["stage"] for job in (bad, good, other)] == ["first", "second", "second"]


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), TimeoutError(), asyncpg.DeadlockDetectedError("deadlock")], ids=repr
)
async def test_error_of_the_connection_reaches_every_waiter(
    world: ProbeWorld, pool: asyncpg.Pool, error: Exception
) -> None:
    db = Counting(pool)
    db.raises.append(error)
    group = GroupedAdvances(db, TTL, window=0.02)
    jobs = await claimed(world, pool, 3)
    answers = await asyncio.gather(*(group.advance(step_of(job)) for job in jobs), return_exceptions=True)
    assert answers == [error] * 3
    assert db.statements == [3]
    # and the next ones are sent as ever
    assert all(await asyncio.gather(*(group.advance(step_of(job)) for job in jobs)))


async def test_asking_again_after_a_lost_answer_changes_nothing(world: ProbeWorld, pool: asyncpg.Pool) -> None:
    db = Counting(pool)
    db.loses_answers = True
    group = GroupedAdvances(db, TTL, window=0.0)
    (job,) = await claimed(world, pool, 1)
    with pytest.raises(ConnectionResetError):
        await group.advance(step_of(job))
    moved, history = await world.job(job.job_id), await world.events(job.job_id)
    assert moved["stage"] == "second"
    db.loses_answers = False
    answer = await group.advance(step_of(job))
    assert answer == queue.Transition(job.job_id, "second", "working")
    assert await world.job(job.job_id) == moved
    assert await world.events(job.job_id) == history


async def test_lost_answers_of_the_runner_end_in_one_transition_each(
    world: ProbeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def advance(job: ClaimedJob, context: Any) -> Any:
        from upload_workers.steps import Advance as Done

        return Done()

    real, lost = queue.advance_jobs, []

    async def losing(db: Executor, asked: Any, *, ttl: timedelta) -> dict[UUID, Any]:
        moved = await real(db, asked, ttl=ttl)
        if len(lost) < 4:
            lost.append(len(asked))
            raise ConnectionResetError("the answer was lost")
        return moved

    monkeypatch.setattr(queue, "advance_jobs", losing)
    jobs = await world.enqueue(3)
    async with world.worker({(PIPELINE, "first"): advance, (PIPELINE, "second"): advance}, lease_ttl=30.0):
        await world.until_all("done")
    assert len(lost) == 4
    for job_id in jobs:
        assert await world.events(job_id) == ["job_enqueued", "job_claimed", "job_advanced", "job_done"]


async def test_transition_of_a_job_that_was_stopped_while_it_waited_is_not_sent(
    world: ProbeWorld, pool: asyncpg.Pool
) -> None:
    db = Counting(pool)
    group = GroupedAdvances(db, TTL, window=0.02)
    stopped, good = await claimed(world, pool, 2)
    waiter = asyncio.create_task(group.advance(step_of(stopped)))
    other = asyncio.create_task(group.advance(step_of(good)))
    await asyncio.sleep(0)
    waiter.cancel()
    assert await other is not None
    assert db.statements == [1]
    assert (await world.job(stopped.job_id))["stage"] == "first"


@pytest.mark.parametrize("under_way", [True, False])
async def test_end_of_the_sender_leaves_nobody_waiting(world: ProbeWorld, pool: asyncpg.Pool, under_way: bool) -> None:
    db = Counting(pool)
    db.gate.clear()
    group = GroupedAdvances(db, TTL, window=0.0 if under_way else 30.0)
    jobs = await claimed(world, pool, 2)
    waiters = [asyncio.create_task(group.advance(step_of(job))) for job in jobs]
    await asyncio.sleep(0.02)
    assert bool(db.statements) is under_way
    (sender,) = [task for task in asyncio.all_tasks() if task.get_name() == "grouped-advances"]
    sender.cancel()
    answers = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(answer) for answer in answers] == [ConnectionAbortedError] * 2


async def test_job_that_asks_for_its_next_step_as_soon_as_it_is_answered_is_answered_again(
    world: ProbeWorld, pool: asyncpg.Pool
) -> None:
    """The sender is just ending then: it must send that too, or be seen to be gone."""
    group = GroupedAdvances(pool, TTL, window=0.0)
    (job,) = await claimed(world, pool, 1)
    async with asyncio.timeout(10):
        await group.advance(step_of(job))
        answer = await group.advance(Advance(job.lease, "second", "end", True))
    assert answer is not None
    assert answer.state == "done"
