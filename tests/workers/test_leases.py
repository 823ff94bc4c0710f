"""Leases that are kept, lost, run out and outlived: what a worker does, and what the database has of it."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
from probe_world import ProbeWorld, steps_of, until, until_true
from silent_proxy import SilentProxy

from upload_pipeline.database import queue
from upload_pipeline.database.connection import ConnectionOptions
from upload_pipeline.database.queue import ClaimedJob, Lease
from upload_workers.leases import LeaseKeeper, StopReason, heartbeat_connection
from upload_workers.steps import Advance, Outcome, StepContext


class Waiting:
    """A step that waits until it is let go, and tells what becomes of it."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.ends: list[str] = []

    async def __call__(self, job: ClaimedJob, context: StepContext) -> Outcome:
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        self.ends.append("finished")
        return Advance()


async def no_connection() -> Any:
    raise ConnectionRefusedError("none here")


def keeper_without_database(*, ttl: float = 60.0, step_timeout: float = 60.0) -> LeaseKeeper:
    return LeaseKeeper(uuid4(), no_connection, ttl=ttl, interval=ttl / 3, step_timeout=step_timeout)


async def test_job_restarted_by_force_is_stopped_within_a_beat_and_writes_nothing(world: ProbeWorld) -> None:
    step = Waiting()
    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(step), lease_ttl=30.0, concurrency=1) as runner:
        await step.entered.wait()
        # Out of this worker's reach, so that what it writes would be seen.
        await world.admin.execute("update upload_pipeline.stages set pool = 'elsewhere' where pipeline = 'probe'")
        await world.admin.execute("select * from upload_pipeline.retry_job($1, null, true)", job_id)
        before = await world.job(job_id)
        await until_true(lambda: runner.at_work == 0, "the step to be stopped")
        assert step.ends == ["cancelled"]
    assert await world.job(job_id) == before
    assert before["state"] == "queued"


async def test_job_restarted_by_force_and_claimed_again_by_the_same_worker_is_led_once(world: ProbeWorld) -> None:
    entered, ends = [], []

    async def first(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.append(job.lease.token)
        if len(entered) == 1:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ends.append(job.lease.token)
                raise
        return Advance()

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(first), lease_ttl=30.0, heartbeat_interval=10.0) as runner:
        await until_true(lambda: entered, "the step")
        await world.admin.execute("select * from upload_pipeline.retry_job($1, null, true)", job_id)
        await world.until_state(job_id, "done")
        # The heartbeat is far off: claiming the job anew is what tells that the old lease is gone.
        await until_true(lambda: runner.at_work == 0, "the old task to be stopped")
    assert ends == entered[:1]
    assert len(entered) == 2


def test_a_newer_lease_on_a_job_ends_the_older_one() -> None:
    keeper = keeper_without_database()
    job = uuid4()
    older = keeper.hold(Lease(job, 1), sent=time.monotonic())
    newer = keeper.hold(Lease(job, 2), sent=time.monotonic())
    assert older.stopped is StopReason.LOST
    assert newer.stopped is None
    keeper.forget(older)
    assert keeper.leases() == [Lease(job, 2)]


def test_trust_counts_from_when_the_claim_was_sent_and_ends_before_the_lease() -> None:
    keeper = keeper_without_database(ttl=10.0)
    now = time.monotonic()
    slow_answer = keeper.hold(Lease(uuid4(), 1), sent=now - 9.5)
    fresh = keeper.hold(Lease(uuid4(), 1), sent=now)
    keeper.check_trust()
    assert (slow_answer.stopped, fresh.stopped) == (StopReason.LOST, None)


def test_slow_answer_to_a_transition_does_not_shorten_a_renewal_that_was_sent_later() -> None:
    keeper = keeper_without_database(ttl=10.0)
    held = keeper.hold(Lease(uuid4(), 1), sent=time.monotonic())
    trusted = held.trusted_until
    keeper.next_step(held, sent=time.monotonic() - 8)
    assert held.trusted_until == trusted


def test_job_past_its_step_deadline_is_not_counted_as_held() -> None:
    keeper = keeper_without_database(step_timeout=0.001)
    held = keeper.hold(Lease(uuid4(), 1), sent=time.monotonic())
    time.sleep(0.01)
    keeper.check_trust()
    assert held.stopped is StopReason.TIMED_OUT
    assert keeper.leases() == []


async def test_heartbeat_outlives_any_error_of_its_connection_and_ends_when_told() -> None:
    calls = []

    async def connect() -> Any:
        calls.append(1)
        raise RuntimeError("not an error of any driver")

    keeper = LeaseKeeper(uuid4(), connect, ttl=1.0, interval=0.01, step_timeout=1.0)
    keeper.start(asyncio.get_running_loop())
    await until_true(lambda: len(calls) > 2, "more tries")
    keeper.stop()
    keeper.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


async def test_heartbeat_that_never_comes_through_can_be_stopped_at_once() -> None:
    async def connect() -> Any:
        await asyncio.sleep(3600)

    keeper = LeaseKeeper(uuid4(), connect, ttl=600.0, interval=0.05, step_timeout=1.0)
    keeper.start(asyncio.get_running_loop())
    keeper.stop(timeout=5.0)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


async def test_lease_is_kept_for_much_longer_than_it_lasts(world: ProbeWorld) -> None:
    step = Waiting()
    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(step), lease_ttl=0.6, heartbeat_interval=0.1):
        await step.entered.wait()
        await asyncio.sleep(1.5)
        assert await world.admin.fetchval("select upload_pipeline.reap_expired()") == 0
        step.go.set()
        await world.until_state(job_id, "done")
    assert step.ends == ["finished"]


async def test_lease_is_kept_while_a_step_blocks_the_event_loop_for_longer_than_it_lasts(world: ProbeWorld) -> None:
    (job_id,) = await world.enqueue()
    began: list[float] = []

    async def burn(job: ClaimedJob, context: StepContext) -> Outcome:
        began.append(time.monotonic())
        while time.monotonic() < began[0] + 4.0:
            sum(range(1000))
        return Advance()

    async with world.worker(steps_of(burn), lease_ttl=2.0, heartbeat_interval=0.2):
        # This test shares the blocked loop, so a thread plays the other workers.
        reaped: list[int] = []
        reaper = threading.Thread(target=_reap_for, args=(world.worker_url, 4.5, reaped))
        reaper.start()
        await world.until_state(job_id, "done")
        await asyncio.to_thread(reaper.join)
    assert reaped
    assert set(reaped) == {0}
    assert len(began) == 1
    assert (await world.job(job_id))["retry_count"] == 0


def _reap_for(url: str, seconds: float, reaped: list[int]) -> None:
    end = time.monotonic() + seconds
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < end:
            row = connection.execute("select upload_pipeline.reap_expired()").fetchone()
            assert row is not None
            reaped.append(row[0])
            time.sleep(0.1)


async def test_step_that_takes_too_long_is_stopped_and_tried_again(world: ProbeWorld) -> None:
    step = Waiting()
    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(step), stage_timeout=0.3) as runner:
        job = await world.until_state(job_id, "retryable")
        await until_true(lambda: runner.at_work == 0, "the slot to come free")
    assert (job["error_code"], job["retry_count"], job["stage"]) == ("STAGE_TIMEOUT", 1, "first")
    assert "UPLOAD_PIPELINE_STAGE_TIMEOUT" in job["error_message"]
    assert step.ends == ["cancelled"]


async def test_clock_of_a_step_starts_anew_with_each_step(world: ProbeWorld) -> None:
    async def some_time(job: ClaimedJob, context: StepContext) -> Outcome:
        await asyncio.sleep(0.7)
        return Advance()

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(some_time, some_time), stage_timeout=1.2):
        await world.until_state(job_id, "done")
    assert "job_failed" not in await world.events(job_id)


async def test_step_that_hangs_and_ignores_cancellation_costs_its_lease_and_not_the_worker(world: ProbeWorld) -> None:
    await world.retry_soon()
    hung, release = [], asyncio.Event()

    async def first(job: ClaimedJob, context: StepContext) -> Outcome:
        if not hung:
            hung.append(job.job_id)
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
        return Advance()

    async def reaped() -> bool:
        return "job_reaped" in await world.events(job_id)

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(first), lease_ttl=1.0, heartbeat_interval=0.1, stage_timeout=0.3) as runner:
        try:
            await until(reaped, "the hung step's lease to be reaped")
            (other,) = await world.enqueue()
            await world.until_state(other, "done")
            # promoted, and led to its end by the same worker beside the task that hangs
            await world.until_state(job_id, "done")
            before = await world.job(job_id)
            assert runner.at_work == 1
        finally:
            release.set()
        await until_true(lambda: runner.at_work == 0, "the hung task to end")
        assert await world.job(job_id) == before


async def test_outcome_that_comes_after_the_lease_ran_out_is_not_written(world: ProbeWorld) -> None:
    """The database would still take it: nobody has reaped the job yet. But this worker had given it up."""
    entered, go = asyncio.Event(), asyncio.Event()

    async def deaf(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.set()
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        return Advance()

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(deaf), lease_ttl=30.0) as runner:
        await entered.wait()
        for held in list(runner.keeper._held.values()):
            runner.keeper._stop_task(held, StopReason.LOST)
        go.set()
        await until_true(lambda: runner.at_work == 0, "the task to end")
    assert (await world.job(job_id))["state"] == "working"
    assert "job_advanced" not in await world.events(job_id)


async def test_silent_database_stops_trusted_work_in_time_and_the_worker_goes_on_when_it_answers_again(
    world: ProbeWorld, proxy: SilentProxy
) -> None:
    await world.retry_soon()
    step = Waiting()
    (job_id,) = await world.enqueue()
    options = {"lease_ttl": 1.5, "heartbeat_interval": 0.3, "statement_timeout": 0.5, "connect_timeout": 0.5}
    async with world.worker(steps_of(step), url=proxy.url, **options) as runner:
        await step.entered.wait()
        proxy.silence()
        silenced = time.monotonic()
        await until_true(lambda: step.ends, "the step to be stopped")
        # The last renewal was sent before the silence, and is trusted for 0.9 of its time.
        assert time.monotonic() - silenced >= 0.9
        assert step.ends == ["cancelled"]
        await until_true(lambda: runner.at_work == 0, "the slot to come free")
        assert (await world.job(job_id))["state"] == "working"  # nothing was written

        proxy.heal()
        step.go.set()
        # its own lease ran out; this worker reaps, promotes and finishes it
        await world.until_state(job_id, "done")
    assert step.ends == ["cancelled", "finished"]
    assert "job_reaped" in await world.events(job_id)


async def test_lease_survives_a_silence_shorter_than_itself(world: ProbeWorld, proxy: SilentProxy) -> None:
    step = Waiting()
    (job_id,) = await world.enqueue()
    options = {"lease_ttl": 6.0, "heartbeat_interval": 0.3, "statement_timeout": 0.5, "connect_timeout": 0.5}
    async with world.worker(steps_of(step), url=proxy.url, **options):
        await step.entered.wait()
        proxy.silence()
        await asyncio.sleep(1.0)
        proxy.heal()
        was = (await world.job(job_id))["lease_expires_at"]

        async def renewed() -> bool:
            return bool((await world.job(job_id))["lease_expires_at"] > was)

        await until(renewed, "the next renewal")
        step.go.set()
        await world.until_state(job_id, "done")
    assert step.ends == ["finished"]


async def test_heartbeat_in_a_dead_socket_leaves_its_connection_and_comes_back(
    world: ProbeWorld, proxy: SilentProxy
) -> None:
    (job_id,) = await world.enqueue()
    worker_id = uuid4()
    keeper = LeaseKeeper(
        worker_id,
        lambda: heartbeat_connection(proxy.url, ConnectionOptions(), 0.3),
        ttl=60.0,
        interval=0.3,
        step_timeout=60.0,
    )
    (job,) = await queue.claim_jobs(
        world.admin, worker_id=worker_id, pool="default", limit=1, after_user=None, ttl=timedelta(seconds=60)
    )
    keeper.hold(job.lease, sent=time.monotonic())

    async def renewed_since(moment: Any) -> bool:
        return bool((await world.job(job_id))["lease_expires_at"] > moment)

    keeper.start(asyncio.get_running_loop())
    try:
        first = (await world.job(job_id))["lease_expires_at"]
        await until(lambda: renewed_since(first), "the first renewal")
        proxy.silence()
        await asyncio.sleep(0.8)
        proxy.heal()
        dead = (await world.job(job_id))["lease_expires_at"]
        await until(lambda: renewed_since(dead), "a renewal over a new connection")
    finally:
        await asyncio.to_thread(keeper.stop)
