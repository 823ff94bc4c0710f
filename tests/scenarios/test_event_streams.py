"""Many open streams on one process: each tells its job's whole history, and none costs a connection."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import psutil
import pytest

from tests.api.job_rows import add_job, advance, claim_all, event_ids
from tests.api.live_service import new_user, token
from tests.scenarios.service_process import service_process

BYTES_OF_A_STREAM = 300 * 1024
"""What an open stream may add to the process's memory."""


@pytest.mark.parametrize("streams", [100, pytest.param(1000, marks=pytest.mark.slow)])
async def test_streams_of_one_process_all_see_all(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, streams: int
) -> None:
    user = new_user()
    jobs = [await add_job(admin, user) for _ in range(streams // 5)]
    with service_process(database.worker_url, tmp_path) as service:
        process = psutil.Process(service.process.pid)
        await follow(service.url, user, jobs[0], stop_after=1)
        before = process.memory_info().rss
        opened = asyncio.Semaphore(0)
        followers = [
            asyncio.create_task(follow(service.url, user, jobs[i % len(jobs)], opened=opened)) for i in range(streams)
        ]
        for _ in range(streams):
            await asyncio.wait_for(opened.acquire(), 120)
        await asyncio.sleep(1)
        grown = process.memory_info().rss - before
        connections = await admin.fetchval(
            "select count(*) from pg_stat_activity where application_name = 'upload-pipeline serve'"
        )
        print(f"{streams} streams: {grown / streams / 1024:.0f} KiB each, {connections} connections to the database")
        assert connections <= 10
        assert grown < streams * BYTES_OF_A_STREAM
        claimed = await claim_all(admin)
        for job in jobs:
            await advance(admin, claimed[job], "embedded")
        expected = {job: await event_ids(admin, job) for job in jobs}
        for i, told in enumerate(await asyncio.wait_for(asyncio.gather(*followers), 180)):
            assert told == [*expected[jobs[i % len(jobs)]], "done"]


async def follow(
    url: str, user: UUID, job: UUID, *, opened: asyncio.Semaphore | None = None, stop_after: int | None = None
) -> list[int | str]:
    """A stream over a bare socket: the ids of its events, and the state in which the job ended."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = (
        f"GET /api/v2/jobs/{job}/events HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer {token(user)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(request.encode())
    told: list[int | str] = []
    ending = False
    try:
        status = await reader.readline()
        assert b" 200 " in status, status
        while line := (await reader.readline()).decode():
            if line.startswith("id: "):
                told.append(int(line[4:]))
                if len(told) == 1 and opened is not None:
                    opened.release()
                if len(told) == stop_after:
                    break
            elif line.startswith("event: end"):
                ending = True
            elif line.startswith("data: ") and ending:
                told.append(json.loads(line[6:])["state"])
        return told
    finally:
        writer.close()
