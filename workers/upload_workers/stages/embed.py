"""`embedding` -> `embeddings_buffered`: every buffered chunk gets a vector; each batch is stored as it comes.

With a provider that is paid for each text, the texts go through the worker's batcher.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline.database.documents import buffer_vectors, pending_vectors
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.embedding_batcher import EmbeddingBatcher
from upload_workers.embedding_line import PutOff
from upload_workers.local_usage import note_local_embedding
from upload_workers.passing import is_passing
from upload_workers.steps import Advance, Outcome, Snooze, StepContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = structlog.get_logger(__name__)

WINDOW = 4
"""Requests' worth of texts that a job has in line at once."""

_STORE_TRIES = 5
_STORE_DELAY = 0.5


async def embed(job: ClaimedJob, context: StepContext) -> Outcome:
    """Asks only for what is neither buffered nor stored, so a crash repeats at most what was under way."""
    if context.batcher is not None:
        return await _embed_in_company(job, context, context.batcher)
    model = context.embedder.model
    limit = context.settings.embed_batch_size
    requests = 0
    while pending := await pending_vectors(context.db, document_id=job.document_id, model=model, limit=limit):
        embeddings = await context.embedder.embed([text for _, text in pending])
        requests += 1
        await buffer_vectors(
            context.db, job.lease, model=model, chunk_ids=[chunk_id for chunk_id, _ in pending], embeddings=embeddings
        )
    await note_local_embedding(job, context, requests=requests)
    return Advance()


async def _embed_in_company(job: ClaimedJob, context: StepContext, batcher: EmbeddingBatcher) -> Outcome:
    """A document too long for one lease of the step goes on in the next: what it has is stored."""
    until = time.monotonic() + context.settings.stage_timeout / 2
    limit = context.settings.embed_batch_size * WINDOW
    model = context.embedder.model
    try:
        while pending := await pending_vectors(context.db, document_id=job.document_id, model=model, limit=limit):
            if time.monotonic() >= until:
                raise PutOff(0.0)
            async with aclosing(batcher.embed(job, [text for _, text in pending], until=until)) as arriving:
                async for positions, vectors in arriving:
                    await _store(job, context, [pending[position][0] for position in positions], vectors)
    except PutOff as error:
        return Snooze(timedelta(seconds=error.seconds))
    return Advance()


async def _store(job: ClaimedJob, context: StepContext, chunk_ids: list[UUID], vectors: NDArray[np.float32]) -> None:
    """Tries again where the database is away for a moment: the vectors are paid for."""
    model = context.embedder.model
    for tries_left in reversed(range(_STORE_TRIES)):
        try:
            await buffer_vectors(context.db, job.lease, model=model, chunk_ids=chunk_ids, embeddings=vectors)
        except Exception as error:
            if not tries_left or not is_passing(error):
                raise
            log.warning("write_retried", error=str(error) or type(error).__name__)
            await asyncio.sleep(_STORE_DELAY)
        else:
            return
