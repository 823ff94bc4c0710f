"""`embedding` -> `embeddings_buffered`: every buffered chunk gets a vector; each batch is stored as it comes."""

from __future__ import annotations

from upload_pipeline.database.documents import buffer_vectors, pending_vectors
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.local_usage import note_local_embedding
from upload_workers.steps import Advance, Outcome, StepContext


async def embed(job: ClaimedJob, context: StepContext) -> Outcome:
    """Asks only for what is neither buffered nor stored, so a crash repeats at most one batch."""
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
