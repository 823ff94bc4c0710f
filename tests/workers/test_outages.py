"""The database goes away under load, or in the middle of a verb: workers come back, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import psutil
import pytest
from postgres_servers import FAST as FAST_SERVER
from postgres_servers import temporary_home
from probe_world import ProbeWorld, steps_of, until, until_true

from upload_pipeline.database.embedded import EmbeddedDatabase, ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.steps import Advance, Outcome, Snooze, StepContext


async def nap(job: ClaimedJob, context: StepContext) -> Outcome:
    await asyncio.sleep(0.05)
    return Advance()


@pytest.fixture
async def own_server(tmp_path: Path) -> AsyncIterator[EmbeddedDatabase]:
    """A server that the test may end."""
    with temporary_home() as home:
        server = await asyncio.to_thread(ensure_embedded, home, FAST_SERVER)
        await asyncio.to_thread(apply_migrations, server.admin_url)
        yield server


async def assert_sound(world: ProbeWorld, jobs: list[UUID]) -> None:
    """Each job is done, once, by transitions that follow each other."""
    for job_id in jobs:
        rows = await world.admin.fetch(
            "select code, stage, lease_token from upload_pipeline.events where job_id = $1 order by event_id", job_id
        )
        tokens = [row["lease_token"] for row in rows if row["lease_token"] is not None]
        assert tokens == sorted(tokens)
        moves = [(row["code"], row["stage"]) for row in rows if row["code"] in ("job_advanced", "job_done")]
        assert moves == [("job_advanced", "second"), ("job_done", "end")]
    assert await world.admin.fetchval("select count(*) from upload_pipeline.upload_jobs") == len(jobs)


@pytest.mark.parametrize(
    "crash", [pytest.param(False, marks=pytest.mark.slow, id="restart"), pytest.param(True, id="crash")]
)
async def test_server_that_restarts_under_load(own_server: EmbeddedDatabase, tmp_path: Path, crash: bool) -> None:
    admin = await asyncpg.connect(own_server.admin_url)
    world = ProbeWorld(admin, own_server.worker_url, tmp_path)
    await world.make_pipeline()
    await world.retry_soon()
    jobs = await world.enqueue(60)
    options = {"lease_ttl": 3.0, "heartbeat_interval": 0.3, "concurrency": 4}
    async with world.worker(steps_of(nap, nap), **options) as one, world.worker(steps_of(nap, nap), **options) as two:
        await until_true(lambda: one.ended + two.ended > 8, "some jobs")
        if crash:
            # One backend that dies so takes all down with it; the server recovers by itself from its log.
            os.kill(_a_backend_of(own_server.pid), signal.SIGKILL)
            await until_true(admin.is_closed, "the crash to reach every connection")
        else:
            await admin.close()
            await asyncio.to_thread(stop_embedded, own_server.home)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(ensure_embedded, own_server.home, FAST_SERVER)

        async def connected() -> asyncpg.Connection | None:
            try:
                return await asyncpg.connect(own_server.admin_url)
            except (OSError, asyncpg.PostgresError):
                return None

        admin = await until(connected, "the server", patience=30)
        world = ProbeWorld(admin, own_server.worker_url, tmp_path)
        await world.until_all("done")
        more = await world.enqueue(4)
        await world.until_all("done")
    await assert_sound(world, jobs + more)
    await admin.close()


def _a_backend_of(postmaster: int) -> int:
    for child in psutil.Process(postmaster).children():
        # a backend that has just ended has no command line any more
        with contextlib.suppress(psutil.NoSuchProcess):
            if "upload_worker" in " ".join(child.cmdline()):
                return int(child.pid)
    raise AssertionError("no worker is connected")


async def test_backends_that_are_ended_again_and_again_cost_no_job(world: ProbeWorld) -> None:
    await world.retry_soon()
    jobs = await world.enqueue(30)
    async with world.worker(steps_of(nap, nap), lease_ttl=3.0):
        for _ in range(10):
            await world.admin.execute(
                "select pg_terminate_backend(pid) from pg_catalog.pg_stat_activity"
                " where datname = current_database() and usename = 'upload_worker'"
            )
            await asyncio.sleep(0.05)
        await world.until_all("done")
    await assert_sound(world, jobs)


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        ("claim_jobs", "done"),
        ("renew_leases", "done"),
        ("advance_jobs", "done"),
        ("snooze_job", "retryable"),
        ("fail_job", "retryable"),
        ("release_jobs", "queued"),
    ],
)
async def test_backend_that_is_ended_in_the_middle_of_a_verb(world: ProbeWorld, verb: str, state: str) -> None:
    """The verb waits for a lock when its backend ends: it is tried again, and done once."""
    entered, go = asyncio.Event(), asyncio.Event()

    async def first(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.set()
        if verb == "release_jobs":
            await asyncio.Event().wait()
        await go.wait()
        if verb == "snooze_job":
            return Snooze(timedelta(hours=1))
        if verb == "fail_job":
            raise RuntimeError("as it must")
        return Advance()

    (job_id,) = await world.enqueue()
    blocker = await asyncpg.connect(_admin_url(world))
    stopped = asyncio.Event()

    async def work() -> None:
        options = {"lock_timeout": 20.0, "statement_timeout": 20.0, "lease_ttl": 20.0, "shutdown_grace": 0.1}
        async with world.worker(steps_of(first), **options):
            await stopped.wait()

    transaction = blocker.transaction()
    if verb == "claim_jobs":
        await transaction.start()
        await blocker.execute("lock table upload_pipeline.lanes in access exclusive mode")
    working = asyncio.create_task(work())
    if verb != "claim_jobs":
        await entered.wait()
        await transaction.start()
        await blocker.execute("lock table upload_pipeline.upload_jobs in access exclusive mode")
    (stopped if verb == "release_jobs" else go).set()

    async def ended() -> bool:
        # Not by the blocker: within a transaction this view does not change.
        pids = await world.admin.fetch(
            "select pg_terminate_backend(pid) from pg_catalog.pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock' and query like '%' || $1 || '%'",
            verb,
        )
        return bool(pids)

    await until(ended, f"{verb} to wait for the lock")
    await transaction.rollback()
    if verb == "release_jobs":
        await working
    job = await world.until_state(job_id, state)
    stopped.set()
    await working
    await blocker.close()
    assert job["retry_count"] == (1 if verb == "fail_job" else 0)
    codes = await world.events(job_id)
    assert len([code for code in codes if code not in ("job_enqueued", "job_claimed")]) == (2 if state == "done" else 1)


def _admin_url(world: ProbeWorld) -> str:
    return world.worker_url.replace("upload_worker@", "postgres@")
