"""`embeddings_buffered` -> `embedded`: the new set of chunks takes the old one's place, and the document is found."""

from __future__ import annotations

from functools import partial

from upload_pipeline.database.documents import commit_embeddings
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.steps import Commit, Outcome, StepContext


async def publish(job: ClaimedJob, context: StepContext) -> Outcome:
    """All of it is one transaction of the database."""
    del job
    return Commit(partial(commit_embeddings, model=context.embedder.model))
