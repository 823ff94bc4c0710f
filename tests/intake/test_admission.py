"""Admission of large requests: exact over several processes, given back however a request ends, free after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake import admission as admission_module
from upload_pipeline.intake.admission import ADMISSION_SECONDS, Admissions

HOLDER = """
import asyncio, sys
from upload_pipeline.database.pools import open_pool
from upload_pipeline.intake.admission import Admissions

async def main():
    pool = await open_pool(sys.argv[1], size=1)
    async with Admissions(pool, 1000).admitted(900, "holder"):
        print("admitted", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
async def db(database: Any) -> AsyncIterator[BoundedPool]:
    pool = await open_pool(database.worker_url, size=8)
    yield pool
    await pool.close()


async def in_use(admin: asyncpg.Connection) -> int:
    used: int = await admin.fetchval("select coalesce(sum(bytes), 0)::bigint from upload_pipeline.admissions")
    return used


async def refused(admissions: Admissions, size: int) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        async with admissions.admitted(size, "refused"):
            pytest.fail("it was admitted")
    return caught.value


async def test_the_limit_is_exact_under_calls_at_once_from_several_processes(
    database: Any, admin: asyncpg.Connection
) -> None:
    pools = [await open_pool(database.worker_url, size=8) for _ in range(2)]
    admitted, most = 0, 0
    leave = asyncio.Event()

    async def request(admissions: Admissions) -> bool:
        nonlocal admitted, most
        try:
            async with admissions.admitted(7, "many"):
                admitted += 1
                most = max(most, admitted)
                await leave.wait()
                admitted -= 1
        except PipelineError as error:
            if error.code is not ErrorCode.CAPACITY:
                raise
            return False
        return True

    try:
        processes = [Admissions(pool, 100) for pool in pools]
        requests = [asyncio.create_task(request(processes[number % 2])) for number in range(60)]
        while sum(task.done() for task in requests) < 60 - 14:
            await asyncio.sleep(0.01)
        assert admitted == 14
        assert await in_use(admin) == 98
        leave.set()
        assert sum(await asyncio.gather(*requests)) == 14
        assert most == 14
        assert await in_use(admin) == 0
    finally:
        for pool in pools:
            await pool.close()


async def test_it_is_given_back_when_the_request_fails_or_is_cancelled(
    db: BoundedPool, admin: asyncpg.Connection
) -> None:
    admissions = Admissions(db, 100)
    with contextlib.suppress(ZeroDivisionError):
        async with admissions.admitted(60, "fails"):
            assert await in_use(admin) == 60
            raise ZeroDivisionError
    assert await in_use(admin) == 0

    async def hang() -> None:
        async with admissions.admitted(60, "hangs"):
            await asyncio.sleep(600)

    hanging = asyncio.create_task(hang())
    while not await in_use(admin):
        await asyncio.sleep(0.01)
    hanging.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await hanging
    assert await in_use(admin) == 0


async def test_what_a_killed_process_held_is_free_after_its_time(
    db: BoundedPool, database: Any, admin: asyncpg.Connection
) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, database.worker_url, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"admitted\n"
    finally:
        holder.kill()
        await holder.communicate()
    assert (await refused(Admissions(db, 1000), 200)).code is ErrorCode.CAPACITY
    later = "select * from upload_pipeline.admit_bytes(gen_random_uuid(), 1000, 1000)"
    async with admin.transaction():
        await admin.execute(
            "select set_config('upload_pipeline.now', (now() + make_interval(secs => $1))::text, true)",
            ADMISSION_SECONDS + 1,
        )
        assert await admin.fetchval(later)


async def test_a_request_that_goes_on_is_renewed_and_one_that_ended_is_not(
    db: BoundedPool, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "ADMISSION_SECONDS", 0.4)
    monkeypatch.setattr(admission_module, "RENEW_SECONDS", 0.1)
    admissions = Admissions(db, 100)
    keeping = asyncio.create_task(admissions.keep())
    try:
        async with admissions.admitted(80, "long"):
            for _ in range(4):
                await asyncio.sleep(0.2)
                assert (await refused(admissions, 30)).code is ErrorCode.CAPACITY
        await asyncio.sleep(0.3)
        assert await in_use(admin) == 0
    finally:
        keeping.cancel()


async def test_bytes_of_jobs_at_work_count_and_those_of_waiting_ones_do_not(
    db: BoundedPool, admin: asyncpg.Connection
) -> None:
    for number, state in enumerate(("queued", "working")):
        document = await admin.fetchval(
            """
            insert into upload_pipeline.documents
              (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
            values (gen_random_uuid(), gen_random_uuid(), 'a.txt', 'text/plain', 70, repeat($1, 64), $1)
            returning document_id
            """,
            str(number),
        )
        await admin.execute(
            "select upload_pipeline.enqueue_job(document_id, user_id) from upload_pipeline.documents"
            " where document_id = $1",
            document,
        )
        if state == "working":
            await admin.execute("select upload_pipeline.claim_jobs(gen_random_uuid(), 'default', 1)")
    error = await refused(Admissions(db, 100), 31)
    assert error.details == {"bytes": 31, "bytes_in_use": 70, "max_bytes": 100}
    async with Admissions(db, 100).admitted(30, "fits"):
        assert (await refused(Admissions(db, 100), 1)).details["bytes_in_use"] == 100


async def test_passing_four_fifths_is_an_event_each_time_and_staying_above_is_none(
    db: BoundedPool, admin: asyncpg.Connection
) -> None:
    admissions = Admissions(db, 100)

    async def warnings() -> int:
        rows = await admin.fetch("select severity, correlation_id, payload from upload_pipeline.events")
        assert all((row["severity"], row["correlation_id"]) == ("warning", "passes") for row in rows)
        return len(rows)

    async with admissions.admitted(79, "below"):
        assert await warnings() == 0
        async with admissions.admitted(1, "passes"):
            assert await warnings() == 1
            async with admissions.admitted(10, "above"):
                assert await warnings() == 1
        async with admissions.admitted(21, "passes"):
            assert await warnings() == 2


async def test_a_request_that_never_fits_is_told_so_and_asks_nobody(db: BoundedPool) -> None:
    await db.close()
    error = await refused(Admissions(db, 100), 101)
    assert error.code is ErrorCode.FILE_TOO_LARGE
    assert error.details == {"bytes": 101, "max_bytes": 100}


async def test_without_the_database_nothing_is_admitted(db: BoundedPool) -> None:
    db.terminate()
    assert (await refused(Admissions(db, 100), 10)).code is ErrorCode.DATABASE_UNAVAILABLE
