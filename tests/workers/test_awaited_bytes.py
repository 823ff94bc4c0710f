"""Jobs of documents whose bytes were only announced: they wait, look, find, give up, and survive their workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from probe_world import FAST, environment_of, until
from sample_documents import make_document

from upload_pipeline.database import queue
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.database.user_jobs import JobFilter, find_job, list_jobs
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.receive import announce_upload, receive_upload
from upload_pipeline.intake.reserve import ReservedUpload, reserve_upload
from upload_pipeline.intake.staging import Intake
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.failures import missing
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_workers.process import running_worker
from upload_workers.stages.validate import validate
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

USER = UUID("0c8d0a52-4a5e-4f9c-9d0f-6f4c6b9d3a77")
DATA = make_document("md", 5)
TTL = timedelta(seconds=60)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def parser() -> Any:
    parser = LocalParser(60.0, 1024**3)
    yield parser
    parser.close()


@dataclass(frozen=True)
class Waiting:
    """An announced document, its job, and a worker's hands to run its first step with."""

    admin: asyncpg.Connection
    context: StepContext
    intake: Intake
    reserved: ReservedUpload

    async def look(self, context: StepContext | None = None) -> Outcome:
        """What the first step says now; the job is ready again after it."""
        (job,) = await queue.claim_jobs(
            self.context.db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL
        )
        try:
            return await validate(job, context or self.context)
        finally:
            await queue.release_jobs(self.context.db, [job.lease])

    async def refusal(self) -> PipelineError:
        with pytest.raises(PipelineError) as caught:
            await self.look()
        return caught.value

    async def announced_ago(self, seconds: float, window: float = 1200) -> None:
        """Moves the announcement into the past."""
        await self.admin.execute(
            """
            update upload_pipeline.documents
               set updated_at = now() - make_interval(secs => $1),
                   upload_deadline = now() - make_interval(secs => $1) + make_interval(secs => $2)
            """,
            float(seconds),
            float(window),
        )

    async def put(self, data: bytes = DATA) -> None:
        """Bytes that come to the store by themselves, as through a presigned URL."""
        await self.context.store.put_bytes(self.reserved.raw_key, data)

    async def send(self) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield DATA

        await receive_upload(
            self.intake,
            document_id=self.reserved.document_id,
            file_bytes=len(DATA),
            file_sha256=sha256(DATA).hexdigest(),
            chunks=chunks(),
        )

    async def job(self) -> Any:
        return await self.admin.fetchrow(
            """
            select j.*, d.upload_deadline, d.media_type, o.error_code from upload_pipeline.upload_jobs j
              join upload_pipeline.documents d using (document_id)
              left join upload_pipeline.job_outcomes o using (job_id) where job_id = $1
            """,
            self.reserved.job_id,
        )

    async def until_state(self, *states: str) -> Any:
        async def there() -> Any:
            row = await self.job()
            return row if row["state"] in states else None

        return await until(there, f"job in {states}", 30.0)

    async def count(self, code: str) -> int:
        found: int = await self.admin.fetchval(
            "select count(*) from upload_pipeline.events where code::text = $1", code
        )
        return found


@pytest.fixture
async def pool(database: Any) -> AsyncIterator[BoundedPool]:
    pool = await open_pool(database.worker_url, connection_options(load_settings()), size=3)
    yield pool
    await pool.close()


@pytest.fixture
async def waiting(
    database: Any, admin: asyncpg.Connection, pool: BoundedPool, tmp_path: Path, parser: LocalParser
) -> Waiting:
    settings = load_settings(**{**FAST, "home": tmp_path, "database_url": database.worker_url})
    store = open_store(settings.effective_storage_url)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    intake = Intake(pool, store, parser.inspect, 200_000, scratch, retry_seconds=0.0)
    context = StepContext(pool, store, parser, None, settings, scratch)  # type: ignore[arg-type]
    return Waiting(admin, context, intake, await announce(intake))


async def announce(intake: Intake, window: float = 1200, **more: Any) -> ReservedUpload:
    described: dict[str, Any] = {
        "filename": "claim.md",
        "file_bytes": len(DATA),
        "media_type": "text/markdown",
        "file_sha256": sha256(DATA).hexdigest(),
        "metadata": {},
        "correlation_id": "w-1",
        "window": timedelta(seconds=window),
    }
    return await reserve_upload(intake, user_id=USER, **{**described, **more})


# What the step says.


@pytest.mark.parametrize(
    ("ago", "window", "shortest", "longest"),
    [(0, 1200, 1, 1), (20, 1200, 10, 12), (600, 1200, 30, 30), (600, 610, 8, 10), (600, 600.5, 1, 1)],
)
async def test_bytes_that_are_not_there_are_waited_for_longer_and_longer(
    waiting: Waiting, ago: float, window: float, shortest: float, longest: float
) -> None:
    await waiting.announced_ago(ago, window)
    outcome = await waiting.look()
    assert isinstance(outcome, Snooze)
    assert shortest <= outcome.delay.total_seconds() <= longest


async def test_past_the_deadline_they_are_given_up(waiting: Waiting) -> None:
    await waiting.announced_ago(1300)
    error = await waiting.refusal()
    assert error.code is ErrorCode.UPLOAD_EXPIRED
    assert not error.retryable
    assert "claim.md" in error.message


@pytest.mark.parametrize("ago", [0, 1300], ids=["in time", "late"])
async def test_bytes_that_are_there_end_the_wait_whatever_the_time(waiting: Waiting, ago: float) -> None:
    await waiting.announced_ago(ago)
    await waiting.put()
    outcome = await waiting.look()
    assert isinstance(outcome, Commit)
    assert list(waiting.context.scratch.iterdir()) == []


@pytest.mark.parametrize("data", [b"short", b"x" * len(DATA)], ids=["another length", "another sha256"])
async def test_other_bytes_are_named(waiting: Waiting, data: bytes) -> None:
    await waiting.announced_ago(5)
    await waiting.put(data)
    error = await waiting.refusal()
    assert error.code is ErrorCode.CHECKSUM_MISMATCH
    assert not error.retryable
    await waiting.put()
    assert isinstance(await waiting.look(), Commit)


@pytest.mark.parametrize("data", [b"short", b"x" * len(DATA)], ids=["another length", "another sha256"])
async def test_other_bytes_of_an_earlier_announcement_are_as_none(waiting: Waiting, data: bytes) -> None:
    await waiting.put(data)
    await asyncio.sleep(0.02)
    await announce(waiting.intake)
    assert isinstance(await waiting.look(), Snooze)
    await waiting.admin.execute("update upload_pipeline.documents set upload_deadline = now()")
    assert (await waiting.refusal()).code is ErrorCode.UPLOAD_EXPIRED


@pytest.mark.parametrize("earlier", [0, 1], ids=["the same second", "the second before"])
async def test_a_store_that_tells_whole_seconds_is_believed_within_the_second(waiting: Waiting, earlier: int) -> None:
    await waiting.put(b"x" * len(DATA))
    since = await waiting.admin.fetchval("select updated_at from upload_pipeline.documents")
    second = int(since.timestamp()) - earlier
    for path in (waiting.context.settings.home / "storage").rglob(str(waiting.reserved.document_id)):
        os.utime(path, (second, second))
    if earlier:
        assert isinstance(await waiting.look(), Snooze)
    else:
        assert (await waiting.refusal()).code is ErrorCode.CHECKSUM_MISMATCH


async def test_bytes_that_go_between_two_looks_at_them_are_as_none(waiting: Waiting) -> None:
    await waiting.put()

    class Going:
        def __getattr__(self, name: str) -> Any:
            return getattr(waiting.context.store.backend, name)

        async def read(self, key: str, block_bytes: int) -> AsyncGenerator[bytes, None]:
            raise missing(key)
            yield b""

    going = replace(waiting.context, store=ObjectStore(Going()))  # type: ignore[arg-type]
    assert isinstance(await waiting.look(going), Snooze)


async def test_announced_bytes_that_cannot_be_read_are_refused_and_stay_announced(
    waiting: Waiting,
) -> None:
    data = b"%PDF-1.7\nno more than that"
    reserved = await announce(
        waiting.intake,
        filename="broken.pdf",
        media_type="",
        file_bytes=len(data),
        file_sha256=sha256(data).hexdigest(),
        priority=1,
    )
    await waiting.context.store.put_bytes(reserved.raw_key, data)
    assert (await waiting.refusal()).code is ErrorCode.CORRUPT_FILE


# The whole way, with a worker.


async def test_a_job_waits_without_an_error_and_ends_once_its_bytes_come(waiting: Waiting, database: Any) -> None:
    async with running_worker(waiting.context.settings, database.worker_url):
        await waiting.until_state("retryable")
        async with as_user(waiting.context.db, USER) as connection:  # type: ignore[arg-type]
            status = await find_job(connection, waiting.reserved.job_id, default_seconds=60)  # type: ignore[arg-type]
            (listed,) = await list_jobs(connection, JobFilter(), limit=10, before=None, default_seconds=60)
        assert status == replace(listed, estimated_completion_at=status.estimated_completion_at)  # type: ignore[union-attr]
        assert (listed.stage, listed.state, listed.progress, listed.error) == ("queued", "retryable", 0, None)
        assert listed.retry_count == 0
        await waiting.send()
        job = await waiting.until_state("done", "deadletter")
    assert (job["state"], job["upload_deadline"], job["retry_count"]) == ("done", None, 0)
    assert await waiting.count("document_accepted") == await waiting.count("job_done") == 1


async def test_bytes_that_come_by_themselves_are_found_at_once_when_somebody_says_so(
    waiting: Waiting, database: Any
) -> None:
    await waiting.announced_ago(500)  # left to itself the job would look every half a minute
    async with running_worker(waiting.context.settings, database.worker_url):
        await waiting.until_state("retryable")
        await waiting.put()
        await announce_upload(waiting.intake, document_id=waiting.reserved.document_id)
        job = await waiting.until_state("done", "deadletter")
    assert (job["state"], job["media_type"], job["upload_deadline"]) == ("done", "text/markdown", None)
    assert await waiting.count("document_accepted") == 1


async def test_a_job_gives_up_at_the_deadline_and_goes_on_when_the_file_is_announced_again(
    waiting: Waiting, database: Any
) -> None:
    await waiting.announced_ago(0, 0.5)
    async with running_worker(waiting.context.settings, database.worker_url):
        job = await waiting.until_state("deadletter")
        assert job["error_code"] == "UPLOAD_EXPIRED"
        again = await announce(waiting.intake)
        assert again.job_id == waiting.reserved.job_id
        await waiting.send()
        job = await waiting.until_state("done", "deadletter")
    assert (job["state"], job["error_code"]) == ("done", None)


def start_killable(settings: dict[str, object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "killable_worker.py")],
        env=environment_of(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


async def test_a_worker_killed_while_it_validates_costs_nothing_and_the_job_is_done_once(
    waiting: Waiting, database: Any
) -> None:
    await waiting.put()
    settings = {**FAST, "home": waiting.context.settings.home, "database_url": database.worker_url, "lease_ttl": 1.0}
    process = start_killable(settings)
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        assert UUID(line.strip()) == waiting.reserved.job_id
        assert (await waiting.job())["upload_deadline"] is not None
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    name = await waiting.admin.fetchval("select quote_ident(current_database())")
    await waiting.admin.execute(
        f"alter role upload_worker in database {name} set upload_pipeline.backoff_base = '10 milliseconds'"
    )
    async with running_worker(waiting.context.settings, database.worker_url):
        job = await waiting.until_state("done", "deadletter")
    assert (job["state"], job["stage"], job["upload_deadline"]) == ("done", "embedded", None)
    assert await waiting.count("document_accepted") == await waiting.count("job_done") == 1
    assert await waiting.count("job_reaped") == 1
    chunks = await waiting.admin.fetch("select ordinal from upload_pipeline.document_chunks where live order by 1")
    assert [row["ordinal"] for row in chunks] == list(range(len(chunks)))
    assert chunks
