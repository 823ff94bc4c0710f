"""A pipeline of two plain steps for the workers' tests, jobs in it, workers for it, and ways to look and to wait."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.settings import Settings, load_settings
from upload_workers.process import running_worker
from upload_workers.runner import Runner
from upload_workers.steps import Advance, Outcome, Step, StepContext

PIPELINE = "probe"
STAGES = ("first", "second", "end")
PATIENCE = 15.0
"""Seconds after which a test gives up; what is waited for takes a fraction of one on a machine that is not busy."""

FAST: Mapping[str, object] = {
    "lease_ttl": 2.0,
    "heartbeat_interval": 0.2,
    "poll_min": 0.02,
    "poll_max": 0.1,
    "connect_timeout": 2.0,
    "statement_timeout": 2.0,
    "lock_timeout": 1.0,
    "shutdown_grace": 5.0,
    "shutdown_deadline": 10.0,
    "pool_size": 4,
}


async def advance(job: ClaimedJob, context: StepContext) -> Outcome:
    """Is done at once."""
    del job, context
    return Advance()


def steps_of(first: Step = advance, second: Step = advance) -> dict[tuple[str, str], Step]:
    """The probe pipeline's steps."""
    return {(PIPELINE, "first"): first, (PIPELINE, "second"): second}


@dataclass(frozen=True)
class ProbeWorld:
    """A database with the probe pipeline and a home for its workers."""

    admin: asyncpg.Connection
    worker_url: str
    home: Path

    async def make_pipeline(self) -> None:
        """Enters the pipeline's stages."""
        await self.admin.executemany(
            "insert into upload_pipeline.stages (pipeline, stage, position, progress, final) values ($1,$2,$3,$4,$5)",
            [(PIPELINE, stage, place, place * 50, stage == "end") for place, stage in enumerate(STAGES)],
        )

    async def retry_soon(self) -> None:
        """Lets retries come after milliseconds and not seconds, for connections that are opened from now on."""
        name = await self.admin.fetchval("select quote_ident(current_database())")
        await self.admin.execute(
            f"alter role upload_worker in database {name} set upload_pipeline.backoff_base = '10 milliseconds'"
        )

    def settings(self, **overrides: object) -> Settings:
        """Short leases and intervals, and what the test says."""
        return load_settings(**{**FAST, "home": self.home, "database_url": self.worker_url, **overrides})

    @asynccontextmanager
    async def worker(
        self,
        steps: Mapping[tuple[str, str], Step],
        *,
        url: str | None = None,
        pools: tuple[str, ...] = ("default",),
        concurrency: int = 4,
        **overrides: object,
    ) -> AsyncIterator[Runner]:
        """A worker in this process."""
        settings = self.settings(**overrides)
        async with running_worker(
            settings, url or self.worker_url, pools=pools, concurrency=concurrency, steps=steps
        ) as runner:
            yield runner

    async def enqueue(self, count: int = 1, user: UUID | None = None) -> list[UUID]:
        """Jobs of new documents, each of a user of its own unless one is named."""
        documents = [(uuid4(), user or uuid4()) for _ in range(count)]
        await self.admin.executemany(
            """
            insert into upload_pipeline.documents
              (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
            values ($1, $2, 'paper.txt', 'text/plain', 10, $3, $4)
            """,
            [(document, owner, sha256(document.bytes).hexdigest(), str(document)) for document, owner in documents],
        )
        rows = await self.admin.fetch(
            "select job_id from upload_pipeline.enqueue_jobs($1, $2, $3)",
            [document for document, _ in documents],
            [owner for _, owner in documents],
            PIPELINE,
        )
        return [row["job_id"] for row in rows]

    async def job(self, job_id: UUID) -> Any:
        """The job as it stands, with its outcome."""
        return await self.admin.fetchrow(
            """
            select j.*, o.error_code, o.error_message, o.error_details, o.results
              from upload_pipeline.upload_jobs j left join upload_pipeline.job_outcomes o using (job_id)
             where j.job_id = $1
            """,
            job_id,
        )

    async def events(self, job_id: UUID) -> list[str]:
        """The codes of a job's history, oldest first."""
        rows = await self.admin.fetch(
            "select code from upload_pipeline.events where job_id = $1 order by event_id", job_id
        )
        return [row["code"] for row in rows]

    async def until_state(self, job_id: UUID, *states: str) -> Any:
        """The job once it is in one of these states."""

        async def there() -> Any:
            row = await self.job(job_id)
            return row if row["state"] in states else None

        return await until(there, f"job in {states}")

    async def until_all(self, state: str) -> None:
        """Returns once every job is in that state."""

        async def there() -> bool:
            left = await self.admin.fetchval(
                "select count(*) from upload_pipeline.upload_jobs where state::text <> $1", state
            )
            return bool(left == 0)

        await until(there, f"all jobs {state}")


async def until(look: Callable[[], Awaitable[Any]], what: str, patience: float = PATIENCE) -> Any:
    """What `look` answers once that is true; fails, saying what was waited for."""
    deadline = time.monotonic() + patience
    while True:
        if answer := await look():
            return answer
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        await asyncio.sleep(0.02)


async def until_true(look: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Returns once `look` is true."""

    async def there() -> object:
        return look()

    await until(there, what, patience)


def environment_of(settings: Mapping[str, object]) -> dict[str, str]:
    """The environment that gives a process these settings."""
    named = {f"UPLOAD_PIPELINE_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, **named}
