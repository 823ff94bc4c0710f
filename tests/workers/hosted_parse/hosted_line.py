"""A document that LlamaParse is to parse, its job led step by step by hand; and a database to die at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator
from upload_pipeline.database import documents, provider_budget, queue
from upload_pipeline.database.queue import Advance, ClaimedJob
from upload_pipeline.errors import PipelineError
from upload_pipeline.ids import document_id as document_id_of
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.llamaparse_results import PROVIDER
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.rate_headers import key_id_of
from upload_pipeline.settings import Settings
from upload_pipeline.stages import DOCUMENT_STAGES, Stage
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_workers.hosted_parse import open_hosted_parser
from upload_workers.models_in_use import ModelsInUse
from upload_workers.parse_turns import BUDGET
from upload_workers.pipelines import STEPS
from upload_workers.steps import Commit, Snooze, StepContext

TTL = timedelta(seconds=60)
USER = UUID("6f3c1d0e-5b1f-4e57-9d6e-0a6a5f3c2b11")
PATH = [row.stage for row in DOCUMENT_STAGES]
PDF, TEXT = "application/pdf", "text/plain"
PAGES = b"%PDF-1.7\n" + b"<< /Type /Page >>\n" * 4
TIMEOUT = 5.0
"""Seconds of a request; also the time to settle."""


@dataclass
class Line:
    """A document's job, each of its steps run by hand."""

    context: StepContext
    admin: asyncpg.Connection
    simulator: LlamaCloudSimulator
    document: UUID
    job: ClaimedJob

    async def step(self, context: StepContext | None = None) -> timedelta | None:
        """One step, and its outcome written as the runner does; the delay where it is a snooze."""
        context = context or self.context
        outcome = await STEPS[self.job.pipeline, self.job.stage](self.job, context)
        if isinstance(outcome, Snooze):
            await queue.snooze_job(context.db, self.job.lease, delay=outcome.delay)
            return outcome.delay
        if isinstance(outcome, Commit):
            moved = await outcome.verb(context.db, self.job.lease, keep=True, ttl=TTL)
        else:
            asked = Advance(self.job.lease, self.job.stage, PATH[PATH.index(Stage(self.job.stage)) + 1], True)
            moved = (await queue.advance_jobs(context.db, [asked], ttl=TTL))[self.job.job_id]
        self.job = replace(self.job, stage=moved.stage)
        return None

    async def fails(self) -> PipelineError:
        """A step whose error is written as the runner does."""
        with pytest.raises(PipelineError) as caught:
            await self.step()
        error = caught.value
        await queue.fail_job(
            self.context.db,
            self.job.lease,
            code=error.code,
            message=error.message,
            retryable=error.retryable,
            details=error.details,
        )
        return error

    async def claim(self) -> None:
        """The job, whatever it waits for."""
        await self.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where state = 'retryable'")
        await queue.promote_due(self.context.db)
        (self.job,) = await queue.claim_jobs(
            self.context.db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL
        )

    async def take_over(self) -> ClaimedJob:
        """Its worker's lease ran out, and another has it; the lost one comes back."""
        lost = self.job
        await self.admin.execute("update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 s'")
        assert await queue.reap_expired(self.context.db) == 1
        await self.claim()
        return lost

    async def restart(self, stage: str | None = None) -> None:
        """Somebody starts the job again."""
        await queue.retry_job(self.context.db, self.job.job_id, from_stage=stage)
        await self.claim()

    async def submitted(self) -> None:
        """On to `parsing`, and behind the wait for the first look. The budget is told of all that was called."""
        assert await self.step() is None
        assert self.job.stage == "parsing"
        assert self.context.hosted_parser is not None
        await self.context.hosted_parser.turns.close()
        await self.pass_time(10)

    async def parsed(self) -> None:
        """On to `parsed`."""
        await self.submitted()
        assert await self.step() is None
        assert self.job.stage == "parsed"

    async def pass_time(self, seconds: float) -> None:
        """What was submitted and called is so much older."""
        await self.admin.execute(
            """
            update upload_pipeline.parse_submissions
               set begun_at = begun_at - $1::interval, submitted_at = submitted_at - $1::interval,
                   called_at = called_at - $1::interval, called_until = called_until - $1::interval
            """,
            timedelta(seconds=seconds),
        )

    async def use_up(self) -> None:
        """Our own minute is full."""
        while isinstance(
            await provider_budget.reserve(
                self.context.db,
                provider=PROVIDER,
                key_id=key_id_of(KEY),
                model=BUDGET,
                requests=1,
                tokens=0,
                request_limit=self.context.settings.llamaparse_requests_per_minute,
            ),
            provider_budget.Granted,
        ):
            pass

    def use(self, **settings: object) -> None:
        """Works on with these settings."""
        changed = self.context.settings.model_copy(update=settings)
        hosted = open_hosted_parser(self.context.db, ProviderCalls(), changed)
        self.context = replace(self.context, settings=changed, hosted_parser=hosted)

    async def row(self) -> asyncpg.Record:
        return await self.admin.fetchrow(
            "select * from upload_pipeline.documents where document_id = $1", self.document
        )

    async def submissions(self) -> list[asyncpg.Record]:
        return await self.admin.fetch("select * from upload_pipeline.parse_submissions order by begun_at")

    async def retries(self) -> int:
        count: int = await self.admin.fetchval("select retry_count from upload_pipeline.upload_jobs")
        return count

    @property
    def requests(self) -> dict[str, int]:
        return dict(self.simulator.books.requests)

    @property
    def paid(self) -> int:
        """How often the document was paid for."""
        return self.simulator.books.paid[str(self.document)]


OpenLine = Callable[..., Awaitable[Line]]


async def step_context(pool: Any, settings: Settings, parser: LocalParser) -> StepContext:
    """What steps are given."""
    scratch = settings.home / "scratch"
    scratch.mkdir(exist_ok=True)
    return StepContext(
        pool,
        open_store(settings.effective_storage_url),
        parser,
        ModelsInUse(pool, ProviderCalls(), settings),
        settings,
        scratch,
        hosted_parser=open_hosted_parser(pool, ProviderCalls(), settings),
    )


async def accept(pool: Any, store: ObjectStore, content: bytes, media_type: str, user: UUID) -> UUID:
    """A document whose bytes are stored, and its job; its id."""
    digest = sha256(content).hexdigest()
    document = document_id_of(user, digest)
    key = raw_key(user, document)
    await store.put_bytes(key, content)
    await documents.accept_document(
        pool,
        document_id=document,
        user_id=user,
        filename="claim",
        media_type=media_type,
        file_bytes=len(content),
        file_sha256=digest,
        raw_key=key,
        metadata={},
    )
    return document


class HeldDatabase:
    """A database that has no answer to the statement that a word names while `held` says so, until it is let go."""

    def __init__(self, db: Any, word: str, held: Callable[[], bool]) -> None:
        self._db, self._word, self._held = db, word, held
        self.waits = 0
        self.let_go = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        async def run(query: str, *args: Any) -> Any:
            if self._word in query and self._held():
                self.waits += 1
                await self.let_go.wait()
            return await getattr(self._db, name)(query, *args)

        return run


class Crash(BaseException):
    """The process ends here."""


class CrashingDatabase:
    """A database at which the process dies, before the statement that a word names."""

    def __init__(self, db: Any, word: str) -> None:
        self._db, self._word = db, word

    def __getattr__(self, name: str) -> Any:
        async def run(query: str, *args: Any) -> Any:
            if self._word in query:
                raise Crash
            return await getattr(self._db, name)(query, *args)

        return run
