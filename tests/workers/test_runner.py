"""The runner: how many jobs at once, whose turn it is, pools, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from probe_world import ProbeWorld, advance, steps_of, until_true
from silent_proxy import SilentProxy

from upload_pipeline.database import queue
from upload_pipeline.database.queue import ClaimedJob
from upload_workers import runner as runner_module
from upload_workers.steps import Advance, Outcome, StepContext


class Gate:
    """A step that waits until the gate opens, and counts who is inside."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.inside: set[UUID] = set()
        self.most = 0
        self.order: list[ClaimedJob] = []

    async def __call__(self, job: ClaimedJob, context: StepContext) -> Outcome:
        self.inside.add(job.job_id)
        self.order.append(job)
        self.most = max(self.most, len(self.inside))
        try:
            await self.open.wait()
            await asyncio.sleep(0.002)
        finally:
            self.inside.discard(job.job_id)
        return Advance()


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_never_more_jobs_at_once_than_the_bound(world: ProbeWorld, concurrency: int) -> None:
    gate = Gate()
    await world.enqueue(20)
    async with world.worker(steps_of(gate), concurrency=concurrency) as runner:
        await until_true(lambda: len(gate.inside) == concurrency, "the slots to fill")
        await asyncio.sleep(0.2)
        working = await world.admin.fetchval("select count(*) from upload_pipeline.upload_jobs where state = 'working'")
        assert working == concurrency == runner.at_work
        gate.open.set()
        await world.until_all("done")
        await until_true(lambda: runner.ended == 20, "the last task")
    assert gate.most == concurrency
    assert runner.claimed == 20


async def test_users_take_turns(world: ProbeWorld) -> None:
    gate = Gate()
    gate.open.set()
    users = sorted(uuid4() for _ in range(3))
    for user in users:
        await world.enqueue(3, user)
    async with world.worker(steps_of(gate), concurrency=1):
        await world.until_all("done")
    assert [job.user_id for job in gate.order] == users * 3


async def test_stage_with_a_pool_of_its_own_is_handed_on_to_the_worker_of_that_pool(world: ProbeWorld) -> None:
    await world.admin.execute(
        "update upload_pipeline.stages set pool = 'embed' where pipeline = 'probe' and stage = 'second'"
    )
    here, there = Gate(), Gate()
    here.open.set()
    there.open.set()

    async def wrong(job: ClaimedJob, context: StepContext) -> Outcome:
        raise AssertionError("this worker does not serve that pool")

    jobs = await world.enqueue(5)
    async with (
        world.worker(steps_of(here, wrong), pools=("default",)),
        world.worker(steps_of(wrong, there), pools=("embed",), poll_min=3600.0, poll_max=3600.0),
    ):
        await world.until_all("done")
    assert {job.job_id for job in here.order} == {job.job_id for job in there.order} == set(jobs)
    assert "job_handed_on" in await world.events(jobs[0])


async def test_one_worker_serves_several_pools(world: ProbeWorld) -> None:
    await world.admin.execute(
        "update upload_pipeline.stages set pool = 'embed' where pipeline = 'probe' and stage = 'second'"
    )
    await world.enqueue(5)
    async with world.worker(steps_of(), pools=("default", "embed")):
        await world.until_all("done")


async def test_pool_with_work_without_end_does_not_starve_another(world: ProbeWorld) -> None:
    """Of two jobs in the second pool each must have its turn while the first pool always has more."""
    await world.enqueue(40)
    await world.admin.execute(
        "update upload_pipeline.stages set pool = 'embed' where pipeline = 'probe' and stage = 'first'"
    )
    rare = await world.enqueue(2)
    gate = Gate()
    gate.open.set()
    async with world.worker(steps_of(gate), pools=("default", "embed"), concurrency=1, group_window=0.0):
        await world.until_all("done")
    places = [place for place, job in enumerate(gate.order) if job.job_id in rare]
    assert max(places) < 6


async def test_claims_go_on_after_errors_of_the_database(world: ProbeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = queue.claim_jobs, [asyncpg.InterfaceError("closed"), TimeoutError(), RuntimeError("what?")]

    async def failing(*args: Any, **options: Any) -> list[ClaimedJob]:
        if failures:
            raise failures.pop()
        return await real(*args, **options)

    monkeypatch.setattr(queue, "claim_jobs", failing)
    (job_id,) = await world.enqueue()
    async with world.worker(steps_of()):
        await world.until_state(job_id, "done")
    assert failures == []


async def test_stop_lets_running_steps_finish_and_hands_back_at_the_step_boundary(world: ProbeWorld) -> None:
    gate, never = Gate(), Gate()
    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(gate, never)) as runner:
        await until_true(lambda: gate.inside, "the step")
        runner.stop()
        gate.open.set()
    job = await world.job(job_id)
    assert (job["stage"], job["state"], job["retry_count"], job["worker_id"]) == ("second", "queued", 0, None)
    assert never.order == []


async def test_what_does_not_finish_within_the_grace_is_handed_back_with_no_retry_counted(world: ProbeWorld) -> None:
    gate = Gate()
    jobs = await world.enqueue(3)
    async with world.worker(steps_of(gate), shutdown_grace=0.1):
        await until_true(lambda: len(gate.inside) == 3, "the steps")
    for job_id in jobs:
        job = await world.job(job_id)
        assert (job["stage"], job["state"], job["retry_count"]) == ("first", "queued", 0)
        assert (await world.events(job_id))[-1] == "job_released"
    assert await world.admin.fetchval("select count(*) from upload_pipeline.workers") == 0


async def test_jobs_of_a_claim_that_was_under_way_at_the_stop_are_handed_back(
    world: ProbeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, leased, go, gate = queue.claim_jobs, asyncio.Event(), asyncio.Event(), Gate()

    async def slow_answer(*args: Any, **options: Any) -> list[ClaimedJob]:
        jobs = await real(*args, **options)
        if jobs:
            leased.set()
            await go.wait()
        return jobs

    monkeypatch.setattr(queue, "claim_jobs", slow_answer)
    jobs = await world.enqueue(3)
    async with world.worker(steps_of(gate)):
        await leased.wait()
        asyncio.get_running_loop().call_later(0.2, go.set)
    for job_id in jobs:
        job = await world.job(job_id)
        assert (job["state"], job["retry_count"]) == ("queued", 0)
    assert gate.order == []


async def test_trust_is_watched_until_the_last_job_is_gone(world: ProbeWorld, proxy: SilentProxy) -> None:
    """The database goes silent while the worker drains: its steps stop when their trust runs out, grace or not."""
    gate = Gate()
    await world.enqueue()
    options = {"lease_ttl": 1.0, "heartbeat_interval": 0.2, "statement_timeout": 0.5, "connect_timeout": 0.5}
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        async with world.worker(steps_of(gate), url=proxy.url, shutdown_grace=60, shutdown_deadline=60, **options):
            await until_true(lambda: gate.inside, "the step")
            proxy.silence()
            left = loop.time()
    assert loop.time() - left < 20


async def test_end_does_not_wait_for_a_step_that_never_ends(world: ProbeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "RELEASE_TIMEOUT", 0.2)
    entered, release = asyncio.Event(), asyncio.Event()

    async def deaf(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return Advance()

    await world.enqueue()
    async with asyncio.timeout(20):
        async with world.worker(steps_of(deaf), shutdown_grace=0.1, lease_ttl=0.5) as runner:
            await entered.wait()
    release.set()
    await until_true(lambda: runner.at_work == 0, "the step to end")


async def test_worker_is_in_the_register_while_it_works(world: ProbeWorld) -> None:
    async with world.worker(steps_of(advance), pools=("default", "embed"), concurrency=7) as runner:
        row = await world.admin.fetchrow("select * from upload_pipeline.workers")
        assert (row["worker_id"], row["pools"], row["concurrency"]) == (runner.worker_id, ["default", "embed"], 7)
    assert await world.admin.fetchval("select count(*) from upload_pipeline.workers") == 0


async def test_work_that_nobody_waits_for_gets_half_of_the_slots_beside_other_pools(world: ProbeWorld) -> None:
    gate = Gate()
    await world.admin.execute("update upload_pipeline.stages set pool = 'background' where pipeline = 'probe'")
    await world.enqueue(6)
    async with world.worker(steps_of(gate), pools=("background", "default"), concurrency=4) as runner:
        await until_true(lambda: len(gate.inside) == 2, "half of the slots to fill")
        await asyncio.sleep(0.3)
        assert (runner.at_work, gate.most) == (2, 2)
        await world.admin.execute("update upload_pipeline.stages set pool = 'default' where pipeline = 'probe'")
        users = await world.enqueue(3)
        await until_true(lambda: runner.at_work == 4, "the other half to be there for who waits")
        assert len(gate.inside & set(users)) == 2
        gate.open.set()
        await world.until_all("done")


async def test_a_worker_of_nothing_else_uses_all_of_its_slots(world: ProbeWorld) -> None:
    gate = Gate()
    await world.admin.execute("update upload_pipeline.stages set pool = 'background' where pipeline = 'probe'")
    await world.enqueue(4)
    async with world.worker(steps_of(gate), pools=("background",), concurrency=3):
        await until_true(lambda: len(gate.inside) == 3, "all slots to fill")
        gate.open.set()
        await world.until_all("done")
