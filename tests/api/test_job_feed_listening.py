"""Notifications make a stream prompt, and nothing is missed or doubled where they fail.

The intervals are so long here that what arrives in time was told by a notification, unless a test says otherwise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from tests.api.job_rows import add_job, advance, claim, event_ids
from tests.api.live_service import Frame, LiveService, follow, frames, new_user, running_service, service_settings
from upload_pipeline.api.resources import LISTENER_NAME
from upload_pipeline.database import listening, queue
from upload_pipeline.settings import Settings

SOON = 2.0
"""Seconds within which a notification has an event arrive, also on a busy machine."""

LISTENERS = "select count(*) from pg_stat_activity where application_name = $1 and datname = current_database()"


def slow_to_look(database: Any, home: Path, **overrides: Any) -> Settings:
    """Settings under which only a notification is prompt."""
    chosen = {"sse_interval": 10.0, "sse_listening_interval": 15.0, "sse_heartbeat": 60.0, **overrides}
    return service_settings(database.worker_url, home, **chosen)


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(slow_to_look(database, tmp_path)) as running:
        await until_listening(running)
        yield running


async def until_listening(service: LiveService) -> None:
    async with asyncio.timeout(20):
        while not service.resources.job_feed.listening:
            await asyncio.sleep(0.01)


async def until_told(service: LiveService, job: UUID) -> None:
    """Until notifications can be relied on for a job."""
    async with asyncio.timeout(20):
        while not service.resources.job_feed._watches.told(job):
            await asyncio.sleep(0.01)


class Stream:
    """An open stream of one job, read by a task."""

    def __init__(self, client: httpx.AsyncClient, job: UUID) -> None:
        self.arrived: asyncio.Queue[tuple[float, Frame]] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(client, job))

    async def _read(self, client: httpx.AsyncClient, job: UUID) -> None:
        headers = {"Accept": "text/event-stream"}
        with suppress(httpx.ReadError):  # the service is gone
            async with client.stream("GET", f"/api/v2/jobs/{job}/events", headers=headers) as response:
                async for frame in frames(response):
                    if frame.data is not None:
                        self.arrived.put_nowait((time.monotonic(), frame))

    async def next(self, seconds: float) -> tuple[float, Frame]:
        return await asyncio.wait_for(self.arrived.get(), seconds)

    async def rest(self, seconds: float = 30) -> list[Frame]:
        await asyncio.wait_for(self._task, seconds)
        return [self.arrived.get_nowait()[1] for _ in range(self.arrived.qsize())]


async def test_each_event_is_streamed_long_before_the_next_look(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    stream = Stream(service.client(user), job)
    first = await stream.next(SOON)
    claimed = await claim(admin, job)
    told = [first, await stream.next(12)]
    await until_told(service, job)
    waits = []
    for stage, there in (("queued", "job_validated"), ("job_validated", "parsing"), ("parsing", "parsed")):
        await advance(admin, claimed, there, stage)
        began = time.monotonic()
        told.append(await stream.next(SOON))
        waits.append(told[-1][0] - began)
    print(f"from the transition to the line of the stream: {[f'{wait * 1000:.0f} ms' for wait in waits]}")
    await advance(admin, claimed, "embedded", "parsed")
    rest = await stream.rest(SOON)
    assert [frame.id for _, frame in told] + [frame.id for frame in rest[:-1]] == await event_ids(admin, job)
    assert rest[-1].data == {"state": "done"}


async def test_fifty_streams_share_one_connection_that_listens(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    jobs = [await add_job(admin, user) for _ in range(25)]
    streams = [Stream(service.client(user), job) for job in (*jobs, *jobs)]
    for stream in streams:
        await stream.next(20)
    for job in jobs:
        await until_told(service, job)
    assert await admin.fetchval(LISTENERS, LISTENER_NAME) == 1
    assert await admin.fetchval("select count(*) from upload_pipeline.job_watches") == 25
    for job in jobs:
        await queue.cancel_job(admin, job)
    for stream in streams:
        assert (await stream.rest(SOON * 5))[-1].data == {"state": "cancelled"}
    async with asyncio.timeout(SOON * 5):
        while await admin.fetchval("select count(*) from upload_pipeline.job_watches"):
            await asyncio.sleep(0.01)


async def test_two_processes_are_both_told(database: Any, admin: asyncpg.Connection, tmp_path: Path) -> None:
    user = new_user()
    job = await add_job(admin, user)
    settings = slow_to_look(database, tmp_path)
    async with running_service(settings) as one, running_service(settings) as two:
        streams = []
        for service in (one, two):
            await until_listening(service)
            streams.append(Stream(service.client(user), job))
            await streams[-1].next(SOON)
            await until_told(service, job)
        assert await admin.fetchval(LISTENERS, LISTENER_NAME) == 2
        await queue.cancel_job(admin, job)
        for stream in streams:
            assert (await stream.rest(SOON))[-1].data == {"state": "cancelled"}


async def test_a_connection_that_is_killed_loses_nothing_and_is_opened_again(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "REBUILD_DELAYS", (0.3, 1.0))
    user = new_user()
    job = await add_job(admin, user)
    async with running_service(slow_to_look(database, tmp_path, sse_interval=0.05)) as service:
        await until_listening(service)
        following = asyncio.create_task(follow(service.client(user), job))
        while not service.resources.job_feed.watchers:
            await asyncio.sleep(0.01)
        claimed = await claim(admin, job)
        for here, there in (
            ("queued", "job_validated"),
            ("job_validated", "parsing"),
            ("parsing", "parsed"),
            ("parsed", "chunking"),
        ):
            await until_told(service, job)
            killed = await admin.fetchval(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = $1"
                " and datname = current_database()",
                LISTENER_NAME,
            )
            assert killed == 1
            await advance(admin, claimed, there, here)
            async with asyncio.timeout(20):
                while service.resources.job_feed.listening:
                    await asyncio.sleep(0.005)
            await until_listening(service)
        await advance(admin, claimed, "embedded", "chunking")
        told = await asyncio.wait_for(following, 20)
        assert [frame.id for frame in told[:-1]] == await event_ids(admin, job)


async def test_a_transition_that_was_under_way_when_the_watching_began_is_not_missed(
    database: Any, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    """Its transaction looked for watchers before there was one, and so notifies nobody."""
    user = new_user()
    job, other = await add_job(admin, user), await add_job(admin, user)
    async with running_service(slow_to_look(database, tmp_path, sse_interval=0.1)) as service:
        await until_listening(service)
        begun = admin.transaction()
        await begun.start()
        await queue.cancel_job(admin, job)
        streams = [Stream(service.client(user), named) for named in (job, other)]
        for stream in streams:
            await stream.next(SOON)
        await asyncio.sleep(0.5)
        watches = service.resources.job_feed._watches
        assert len(watches) == 2
        assert not watches.told(job)
        assert not watches.told(other)
        await begun.commit()
        assert (await streams[0].next(SOON))[1].data["code"] == "job_cancelled"
        await until_told(service, other)
        await queue.cancel_job(admin, other)
        assert (await streams[1].next(SOON))[1].data["code"] == "job_cancelled"


async def test_behind_a_transaction_pooler_nothing_listens_and_looking_is_enough(
    database: Any, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    settings = slow_to_look(database, tmp_path, sse_interval=0.05, transaction_pooler=True)
    async with running_service(settings) as service:
        following = asyncio.create_task(follow(service.client(user), job))
        await advance(admin, await claim(admin, job), "embedded")
        told = await asyncio.wait_for(following, 20)
        assert [frame.id for frame in told[:-1]] == await event_ids(admin, job)
        assert await admin.fetchval(LISTENERS, LISTENER_NAME) == 0
        assert await admin.fetchval("select count(*) from upload_pipeline.job_watches") == 0


async def test_a_notification_that_is_lost_costs_time_only(
    database: Any, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    async with running_service(slow_to_look(database, tmp_path, sse_listening_interval=0.5)) as service:
        await until_listening(service)
        following = asyncio.create_task(follow(service.client(user), job))
        while not service.resources.job_feed.watchers:
            await asyncio.sleep(0.01)
        await until_told(service, job)
        await admin.execute("truncate upload_pipeline.job_watches")
        await queue.cancel_job(admin, job)
        assert (await asyncio.wait_for(following, 10))[-1].data == {"state": "cancelled"}


async def test_what_anybody_else_notifies_is_no_harm(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    stream = Stream(service.client(user), job)
    await stream.next(SOON)
    await until_told(service, job)
    for payload in ("", "no id", f"{uuid4()}", f"{job},x", "," * 100):
        await admin.execute("select pg_notify('upload_pipeline_events', $1)", payload)
    await queue.cancel_job(admin, job)
    assert [frame.data.get("code") for frame in await stream.rest(SOON)] == ["job_cancelled", None]


async def test_a_service_that_stops_watches_nothing_more(
    database: Any, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    async with running_service(slow_to_look(database, tmp_path)) as service:
        await until_listening(service)
        stream = Stream(service.client(user), job)
        await stream.next(SOON)
        assert await admin.fetchval("select count(*) from upload_pipeline.job_watches") == 1
    assert await admin.fetchval("select count(*) from upload_pipeline.job_watches") == 0
