"""Waking up: the waits between looks, notifications, a listener that goes deaf, and polling alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg
import pytest
from probe_world import ProbeWorld, advance, steps_of, until_true
from silent_proxy import SilentProxy

from upload_pipeline.database import listening as listening_module
from upload_pipeline.database.connection import ConnectionOptions, connect
from upload_pipeline.database.listening import Listener
from upload_workers.wake import AdaptivePoll, wake_listener


@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_waits_double_up_to_the_longest_and_are_spread_by_a_fifth(jitter: float, factor: float) -> None:
    poll = AdaptivePoll(0.25, 5.0, jitter=lambda: jitter)
    waits = [poll.next_wait() for _ in range(7)]
    assert waits == pytest.approx([wait * factor for wait in (0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0)])


def test_work_that_was_found_makes_the_next_wait_short_again() -> None:
    poll = AdaptivePoll(0.25, 5.0, jitter=lambda: 0.5)
    for _ in range(4):
        poll.next_wait()
    poll.found_work()
    assert [poll.next_wait(), poll.next_wait()] == [0.25, 0.5]


def test_equal_bounds_give_equal_waits() -> None:
    poll = AdaptivePoll(1.0, 1.0, jitter=lambda: 0.5)
    assert [poll.next_wait(), poll.next_wait()] == [1.0, 1.0]


@asynccontextmanager
async def listening(listener: Listener) -> AsyncIterator[None]:
    task = asyncio.create_task(listener.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def listener_on(
    url: str, *, pools: tuple[str, ...] = ("default",), probe_interval: float = 30.0
) -> tuple[Listener, asyncio.Event]:
    options = ConnectionOptions(connect_timeout=1.0, statement_timeout=1.0)
    wake = asyncio.Event()
    listener = wake_listener(lambda: connect(url, options), pools, wake)
    listener.probe_interval, listener.probe_timeout = probe_interval, 0.5
    return listener, wake


async def test_listener_proves_itself_and_has_the_worker_look_once(world: ProbeWorld) -> None:
    listener, wake = listener_on(world.worker_url)
    async with listening(listener):
        await asyncio.wait_for(wake.wait(), 10)
        await until_true(lambda: listener.healthy, "the proof")
    assert listener.healthy


async def test_notification_for_a_served_pool_wakes_and_any_other_does_not(world: ProbeWorld) -> None:
    listener, wake = listener_on(world.worker_url, pools=("a", "b"))
    async with listening(listener):
        await until_true(lambda: listener.healthy, "the proof")
        wake.clear()
        await world.admin.execute("select pg_notify('upload_pipeline_jobs', 'c')")
        await world.admin.execute("select pg_notify('upload_pipeline_jobs', 'probe:somebody else')")
        await asyncio.sleep(0.1)
        assert not wake.is_set()
        await world.admin.execute("select pg_notify('upload_pipeline_jobs', 'b')")
        await asyncio.wait_for(wake.wait(), 10)


async def test_deaf_listener_is_found_out_and_rebuilt(
    world: ProbeWorld, proxy: SilentProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening_module, "REBUILD_DELAYS", (0.05, 0.2))
    listener, wake = listener_on(proxy.url, probe_interval=0.1)
    async with listening(listener):
        await until_true(lambda: listener.healthy, "the proof")
        before = proxy.accepted
        proxy.silence()
        await until_true(lambda: not listener.healthy, "the listener to be found out")
        proxy.heal()
        wake.clear()
        await until_true(lambda: listener.healthy, "a new proof")
        # what was notified in between is found by looking once
        assert wake.is_set()
        assert proxy.accepted > before
        wake.clear()
        await world.admin.execute("select pg_notify('upload_pipeline_jobs', 'default')")
        await asyncio.wait_for(wake.wait(), 10)


async def test_listener_whose_backend_ends_is_rebuilt_at_once_and_not_at_its_next_proof(
    world: ProbeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening_module, "REBUILD_DELAYS", (0.05, 0.2))
    listener, wake = listener_on(world.worker_url, probe_interval=3600.0)
    async with listening(listener):
        await until_true(lambda: listener.healthy, "the proof")
        wake.clear()
        await world.admin.execute(
            "select pg_terminate_backend(pid) from pg_catalog.pg_stat_activity where usename = 'upload_worker'"
            " and datname = current_database()"
        )
        await asyncio.wait_for(wake.wait(), 10)


async def test_rebuilding_starts_from_the_shortest_wait_after_each_time_of_health(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening_module, "REBUILD_DELAYS", (1.0, 4.0))
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real_sleep(0)
        if len(waits) == 4:
            listener.healthy = True
        if len(waits) == 6:
            raise asyncio.CancelledError

    async def refuse() -> asyncpg.Connection:
        raise ConnectionRefusedError("no database")

    monkeypatch.setattr(listening_module.asyncio, "sleep", sleep)
    listener = wake_listener(refuse, ("default",), asyncio.Event())
    with pytest.raises(asyncio.CancelledError):
        await listener.run()
    assert waits == [1.0, 2.0, 4.0, 4.0, 1.0, 2.0]


async def test_job_that_is_enqueued_is_begun_long_before_the_next_poll(world: ProbeWorld) -> None:
    async with world.worker(steps_of(), poll_min=3600.0, poll_max=3600.0) as runner:
        await until_true(lambda: runner.poll._wait == 3600.0, "the worker to be idle")
        listeners = "select count(*) from pg_stat_activity where query like '%pg_notify%' and usename = 'upload_worker'"
        while not await world.admin.fetchval(listeners):
            await asyncio.sleep(0.02)
        (job_id,) = await world.enqueue()
        await world.until_state(job_id, "done")


async def test_polling_alone_is_enough(world: ProbeWorld) -> None:
    async with world.worker(steps_of(), transaction_pooler=True, poll_max=0.1):
        await asyncio.sleep(0.3)
        began = time.monotonic()
        (job_id,) = await world.enqueue()
        await world.until_state(job_id, "done")
        assert time.monotonic() - began < 10
    listened = await world.admin.fetchval(
        "select count(*) from pg_stat_activity where query like '%listen%' and usename = 'upload_worker'"
    )
    assert listened == 0


async def test_freed_lane_is_taken_up_without_a_poll(world: ProbeWorld) -> None:
    """A user at the cap: the end of one job, and nothing else, makes room for the next."""
    from uuid import uuid4

    user = uuid4()
    await world.enqueue(5, user)
    await world.admin.execute("update upload_pipeline.lanes set max_in_flight = 1 where user_id = $1", user)
    async with world.worker(steps_of(advance), poll_min=3600.0, poll_max=3600.0):
        await world.until_all("done")


async def test_worker_that_was_woken_and_found_nothing_looks_again_soon(world: ProbeWorld) -> None:
    """What woke it may be in a lane that its claim passed over, since another had locked it."""
    other = await connect(world.worker_url)
    (job_id,) = await world.enqueue()
    try:
        async with world.admin.transaction():
            await world.admin.execute("select from upload_pipeline.lanes for update")
            async with world.worker(steps_of(), poll_min=0.2, poll_max=3600.0) as runner:
                runner.poll._wait = 3600.0
                await until_true(lambda: runner.poll._wait == 3600.0, "the worker to be idle")
                await asyncio.sleep(0.3)
                await other.execute("select pg_notify('upload_pipeline_jobs', 'default')")
                await until_true(lambda: runner.poll._wait < 2, "the claim that found nothing")
                await world.admin.execute("rollback")
                job = await world.until_state(job_id, "done")
                assert job["retry_count"] == 0
                await world.admin.execute("begin")
    finally:
        await other.close()
