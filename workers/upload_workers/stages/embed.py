"""`embedding` -> `embeddings_buffered`: every buffered chunk gets a vector of the active model.

Where another model is being filled it gets one of that as well, if that is quickly done: what becomes live then lacks
nothing, and the filling comes to its end however many documents arrive. The user does not wait for it to work out; what
is left is the filling's own. Where the new model's provider fails, or does not answer in time, a worker does not try it
again for some minutes: each document would wait as long.
"""

from __future__ import annotations

import asyncio

import structlog

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import PipelineError
from upload_workers.embedding_line import PutOff
from upload_workers.filling import fill
from upload_workers.steps import Advance, Outcome, StepContext

log = structlog.get_logger(__name__)

AHEAD_SECONDS = 20.0
"""For which a document waits for vectors that nobody needs yet."""


async def embed(job: ClaimedJob, context: StepContext) -> Outcome:
    """Asks only for what is neither buffered nor stored; a document too long for one lease goes on in the next."""
    try:
        await fill(job, context, await context.models.active(), seconds=context.settings.stage_timeout / 2)
    except PutOff as error:
        return error.outcome()
    await _embed_ahead(job, context)
    return Advance()


async def _embed_ahead(job: ClaimedJob, context: StepContext) -> None:
    try:
        building = await context.models.building()
        if building is None or building[1]:
            return
        model = building[0]
        if model.rest.left or model.rest_ahead.left:
            return
        try:
            async with asyncio.timeout(AHEAD_SECONDS):
                await fill(job, context, model, seconds=AHEAD_SECONDS / 2)
        except (PipelineError, TimeoutError) as error:
            # a text that is refused is the document's own
            if not isinstance(error, PipelineError) or error.retryable:
                model.rest_ahead.begin()
            raise
    except (PutOff, PipelineError, TimeoutError) as error:
        log.info("not_embedded_ahead", error=str(error) or type(error).__name__)
