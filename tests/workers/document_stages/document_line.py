"""A document whose job is led step by step by hand; and a database to die at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from sample_documents import Kind

from upload_pipeline.database import queue
from upload_pipeline.database.queue import Advance, ClaimedJob
from upload_pipeline.stages import DOCUMENT_STAGES, Stage
from upload_workers.pipelines import STEPS
from upload_workers.steps import Commit, StepContext

TTL = timedelta(seconds=60)
USER = UUID("6f3c1d0e-5b1f-4e57-9d6e-0a6a5f3c2b11")
TYPES: dict[Kind, str] = {
    "pdf": "application/pdf",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "txt": "text/plain",
    "md": "text/markdown",
    "html": "text/html",
}
PATH = [row.stage for row in DOCUMENT_STAGES]

ROWS = {
    "documents": "select document_id, filename, markdown_key, markdown_sha256, page_count, page_starts, chunk_count,"
    " parser, chunker, embed_model, searchable_at is not null as searchable from upload_pipeline.documents",
    "chunks": "select chunk_id, ordinal, text, chunk_sha256, start_offset, end_offset, page_from, page_to,"
    " heading_path, section_ids, embed_model, embedding::text as embedding, live"
    " from upload_pipeline.document_chunks order by chunk_id",
    "nodes": "select node_id, kind, document_id from upload_pipeline.document_nodes order by node_id",
    "edges": "select source_id, kind, target_id from upload_pipeline.document_edges order by 1, 2, 3",
    "chunk buffer": "select count(*) from upload_pipeline.document_chunk_buffer",
    "vector buffer": "select count(*) from upload_pipeline.document_vector_buffer",
    "cached chunks": "select count(*) from upload_pipeline.document_cached_chunks",
}


@dataclass(frozen=True)
class Line:
    """One document on its way through the steps, each run by hand."""

    context: StepContext
    admin: asyncpg.Connection
    document: UUID

    async def claim(self) -> ClaimedJob:
        (job,) = await queue.claim_jobs(
            self.context.db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL
        )
        return job

    async def run(self, job: ClaimedJob) -> ClaimedJob:
        """Runs the step of the job's stage and writes its outcome, as the runner does."""
        outcome = await STEPS[job.pipeline, job.stage](job, self.context)
        if isinstance(outcome, Commit):
            moved = await outcome.verb(self.context.db, job.lease, keep=True, ttl=TTL)
        else:
            following = PATH[PATH.index(Stage(job.stage)) + 1]
            asked = Advance(job.lease, job.stage, following, True)
            moved = (await queue.advance_jobs(self.context.db, [asked], ttl=TTL))[job.job_id]
        return replace(job, stage=moved.stage)

    async def run_to(self, job: ClaimedJob, stage: str) -> ClaimedJob:
        while job.stage != stage:
            job = await self.run(job)
        return job

    async def text_key(self) -> str:
        """Where the text is that the document's row names."""
        key: str = await self.admin.fetchval(
            "select markdown_key from upload_pipeline.documents where document_id = $1", self.document
        )
        return key

    async def rows(self) -> dict[str, list[dict[str, Any]]]:
        return {name: [dict(row) for row in await self.admin.fetch(query)] for name, query in ROWS.items()}

    async def take_over(self, job: ClaimedJob) -> ClaimedJob:
        """The job's lease ran out: another worker has it."""
        await self.admin.execute(
            "update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 s' where job_id = $1",
            job.job_id,
        )
        assert await queue.reap_expired(self.context.db) == 1
        await self.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where job_id = $1", job.job_id)
        assert await queue.promote_due(self.context.db) == 1
        return await self.claim()


OpenLine = Callable[..., Awaitable[Line]]


class Crash(BaseException):
    """The process ends here."""


class CrashingDatabase:
    """A database at which the process dies, before or after the statement that a word names."""

    def __init__(self, db: Any, word: str, *, after: bool, passes: int = 0) -> None:
        self._db, self._word, self._after, self._passes = db, word, after, passes

    async def _run(self, method: str, query: str, *args: Any) -> Any:
        hit = self._word in query
        if hit and self._passes:
            self._passes -= 1
            hit = False
        if hit and not self._after:
            raise Crash
        answer = await getattr(self._db, method)(query, *args)
        if hit:
            raise Crash
        return answer

    async def fetch(self, query: str, *args: Any) -> Any:
        return await self._run("fetch", query, *args)

    async def fetchrow(self, query: str, *args: Any) -> Any:
        return await self._run("fetchrow", query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        return await self._run("fetchval", query, *args)
