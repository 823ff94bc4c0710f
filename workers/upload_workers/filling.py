"""Giving chunks their vectors: those of a document that is processed, and live ones that a new model is filled with.

Which chunks a job means, and where their vectors go, follows from its pipeline. Only what has no vector yet is asked
for, and each part is stored as it comes: a crash repeats at most what was under way. With a provider that is paid for
each text, what the cache has is taken from it, and the other texts go through the worker's batcher, which writes what
comes. Our own embedder has no cache: it costs less than to look.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from upload_pipeline.database.documents import buffer_vectors, pending_vectors
from upload_pipeline.database.embedding_models import pending_refill
from upload_pipeline.stages import REEMBED_PIPELINE
from upload_workers.embedding_line import PutOff
from upload_workers.local_usage import note_local_embedding

if TYPE_CHECKING:
    from upload_pipeline.database.queue import ClaimedJob
    from upload_workers.embedding_batcher import EmbeddingBatcher
    from upload_workers.models_in_use import ModelInUse
    from upload_workers.steps import StepContext

WINDOW = 4
"""Requests' worth of texts that a job has in line at once; twice as many as may be under way, where that is more."""


async def fill(job: ClaimedJob, context: StepContext, model: ModelInUse, *, seconds: float) -> None:
    """Gives each chunk that the job means a vector of a model.

    Args:
        job: of pipeline `document` or `reembed`.
        context: of the worker.
        model: the active one, or one that is being filled.
        seconds: after which no more texts are begun.

    Raises:
        PutOff: some texts are to be embedded later; what there is, is stored.
        PipelineError: as the embedder.
    """
    until = time.monotonic() + seconds
    if model.batcher is not None:
        await _fill_in_company(job, context, model.batcher, until)
        return
    look = pending_refill if job.pipeline == REEMBED_PIPELINE else pending_vectors
    name = model.facts.name
    limit = context.settings.embed_batch_size
    requests = 0
    while pending := await look(context.db, document_id=job.document_id, model=name, limit=limit):
        if time.monotonic() >= until:
            raise PutOff(0.0)
        embeddings = await model.embedder.embed([text for _, text in pending])
        requests += 1
        await buffer_vectors(
            context.db, job.lease, model=name, chunk_ids=[chunk_id for chunk_id, _ in pending], embeddings=embeddings
        )
    await note_local_embedding(job, context, model.facts, requests=requests)


async def _fill_in_company(job: ClaimedJob, context: StepContext, batcher: EmbeddingBatcher, until: float) -> None:
    """A document too long for one lease of the step goes on in the next: what it has is stored."""
    limit = context.settings.embed_batch_size * max(WINDOW, 2 * context.settings.openai_concurrency)
    while True:
        looked_at = time.monotonic()
        filled = await batcher.fill(job, limit)
        if not filled.pending:
            if filled.found:
                continue
            return
        if looked_at >= until:
            raise PutOff(0.0)
        chunk_ids = [chunk_id for chunk_id, _ in filled.pending]
        texts = [text for _, text in filled.pending]
        asked = batcher.embed(job, texts, until=until, chunk_ids=chunk_ids, looked_at=looked_at)
        given = 0
        async with aclosing(asked) as arriving:
            async for positions, _ in arriving:
                given += len(positions)
        if given == len(texts) and filled.found + len(texts) < limit:
            # The look saw all that the job lacks, and each has its vector now; the job's commit asks once more.
            return
