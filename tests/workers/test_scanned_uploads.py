"""Bytes that reached the store past intake: the first step shows them to the virus scanner before all else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from clamd_server import INFECTED, SIGNATURE, Conversation, misbehaving
from probe_world import FAST

from upload_pipeline.database import queue
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.reserve import ReservedUpload, reserve_upload
from upload_pipeline.intake.staging import Intake
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.store import open_store
from upload_pipeline.storage.virus_scan import VirusScanner
from upload_workers.process import running_worker
from upload_workers.stages.validate import validate
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

USER = UUID("0c8d0a52-4a5e-4f9c-9d0f-6f4c6b9d3a78")
CLEAN = b"Plain words, enough of them to be a file.\n" * 50
EVIL = CLEAN + INFECTED


class Opener:
    """Stands for the parser, and remembers whether it was asked."""

    asked = False

    async def inspect(self, _path: Path, _media_type: str) -> None:
        self.asked = True


class Awaited:
    """A document that awaits its bytes, and a step to look for them."""

    def __init__(self, context: StepContext, intake: Intake, admin: asyncpg.Connection) -> None:
        self.context, self.intake, self.admin = context, intake, admin

    async def announce(self, data: bytes) -> ReservedUpload:
        return await reserve_upload(
            self.intake,
            user_id=USER,
            filename="words.txt",
            file_bytes=len(data),
            media_type="text/plain",
            file_sha256=sha256(data).hexdigest(),
            metadata={},
            correlation_id="",
            window=timedelta(minutes=20),
        )

    async def look(self, url: str, seconds: float = 20.0) -> Outcome:
        (job,) = await queue.claim_jobs(
            self.context.db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=timedelta(minutes=1)
        )
        try:
            return await validate(job, replace(self.context, scanner=VirusScanner(url, seconds)))
        finally:
            await queue.release_jobs(self.context.db, [job.lease])

    async def keys(self) -> list[str]:
        return [info.key async for info in self.context.store.list()]


@pytest.fixture
async def awaited(database: Any, admin: asyncpg.Connection, tmp_path: Path) -> AsyncIterator[Awaited]:
    settings = load_settings(**{**FAST, "home": tmp_path, "database_url": database.worker_url})
    pool = await open_pool(database.worker_url, connection_options(settings), size=3)
    store, scratch = open_store(settings.effective_storage_url), tmp_path / "scratch"
    scratch.mkdir()
    opener = Opener()
    intake = Intake(pool, store, opener.inspect, 200_000, scratch, retry_seconds=0.0)
    yield Awaited(StepContext(pool, store, opener, None, settings, scratch), intake, admin)  # type: ignore[arg-type]
    await pool.close()


async def test_infected_bytes_are_refused_unread_and_removed(awaited: Awaited, clamd_url: str) -> None:
    reserved = await awaited.announce(EVIL)
    await awaited.context.store.put_bytes(reserved.raw_key, EVIL)
    with pytest.raises(PipelineError) as caught:
        await awaited.look(clamd_url)
    assert caught.value.code is ErrorCode.MALWARE_FOUND
    assert caught.value.details["signature"] == SIGNATURE
    assert not caught.value.retryable
    assert await awaited.keys() == []
    assert not awaited.context.parser.asked  # type: ignore[attr-defined]
    assert list(awaited.context.scratch.iterdir()) == []


async def test_clean_bytes_go_on(awaited: Awaited, clamd_url: str) -> None:
    reserved = await awaited.announce(CLEAN)
    await awaited.context.store.put_bytes(reserved.raw_key, CLEAN)
    assert isinstance(await awaited.look(clamd_url), Commit)
    assert await awaited.keys() == [reserved.raw_key]


async def hangs_up(with_: Conversation) -> None:
    await with_.read_stream()


async def says_nothing(with_: Conversation) -> None:
    await with_.read_stream()
    await asyncio.sleep(30)


@pytest.mark.parametrize("behaviour", [hangs_up, says_nothing])
async def test_while_the_scanner_is_away_they_wait_until_the_deadline(awaited: Awaited, behaviour: Any) -> None:
    reserved = await awaited.announce(CLEAN)
    await awaited.context.store.put_bytes(reserved.raw_key, CLEAN)
    async with misbehaving(behaviour) as url:
        assert isinstance(await awaited.look(url, 0.3), Snooze)
        await awaited.admin.execute("update upload_pipeline.documents set upload_deadline = now() - interval '1 s'")
        with pytest.raises(PipelineError) as caught:
            await awaited.look(url, 0.3)
    assert caught.value.code is ErrorCode.SCANNER_UNAVAILABLE
    assert not awaited.context.parser.asked  # type: ignore[attr-defined]
    assert await awaited.keys() == [reserved.raw_key]


async def test_a_worker_ends_the_job_of_infected_bytes_and_the_object_goes(
    awaited: Awaited, database: Any, clamd_url: str
) -> None:
    reserved = await awaited.announce(EVIL)
    await awaited.context.store.put_bytes(reserved.raw_key, EVIL)
    settings = awaited.context.settings.model_copy(update={"clamd_url": clamd_url})
    async with running_worker(settings, database.worker_url), asyncio.timeout(30):
        while True:
            row = await awaited.admin.fetchrow(
                "select j.state, o.error_code from upload_pipeline.upload_jobs j "
                "left join upload_pipeline.job_outcomes o using (job_id)"
            )
            if row["state"] == "deadletter":
                break
            await asyncio.sleep(0.05)
    assert row["error_code"] == "MALWARE_FOUND"
    assert await awaited.keys() == []
