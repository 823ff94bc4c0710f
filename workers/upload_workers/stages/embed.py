"""`embedding` -> `embeddings_buffered`: every buffered chunk gets a vector; each batch is stored as it comes.

With a provider that is paid for each text, what the cache has is taken from it, and the other texts go through the
worker's batcher, which writes what comes. Our own embedder has no cache: it costs less than to look.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from datetime import timedelta

from upload_pipeline.database.documents import buffer_vectors, pending_vectors
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.embedding_batcher import EmbeddingBatcher
from upload_workers.embedding_line import PutOff
from upload_workers.local_usage import note_local_embedding
from upload_workers.steps import Advance, Outcome, Snooze, StepContext

WINDOW = 4
"""Requests' worth of texts that a job has in line at once."""


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
    try:
        while (filled := await batcher.fill(job, limit)).found or filled.pending:
            if not filled.pending:
                continue
            if time.monotonic() >= until:
                raise PutOff(0.0)
            chunk_ids = [chunk_id for chunk_id, _ in filled.pending]
            texts = [text for _, text in filled.pending]
            async with aclosing(batcher.embed(job, texts, until=until, chunk_ids=chunk_ids)) as arriving:
                async for _ in arriving:
                    pass
    except PutOff as error:
        return Snooze(timedelta(seconds=error.seconds))
    return Advance()
