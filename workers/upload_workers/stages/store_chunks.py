"""`chunks_buffered` -> `chunked`: buffered chunks are stored beside the live ones."""

from __future__ import annotations

from upload_pipeline.database.documents import commit_chunks
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.steps import Commit, Outcome, StepContext


async def store_chunks(job: ClaimedJob, context: StepContext) -> Outcome:
    """All of it is one statement of the database."""
    del job, context
    return Commit(commit_chunks)
