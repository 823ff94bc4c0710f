"""`queued` -> `filled` of pipeline `reembed`: a document's live chunks get vectors of the model that is being filled.

Nothing is parsed or cut: the stored texts are embedded. Searches do not see the vectors before the model is active.

Nobody waits for these jobs, so an outage of the provider costs them no retry: a job that failed would be a dead letter
within a minute, the next one after it, and the model could not be activated before it is added anew. Whether it is the
provider or a text of the job's own, a text tells that nobody objects to:

    the trial is     the job                                      the model, in this worker
    embedded         fails as any other, to be tried by itself    is filled on
    not embedded     is put off                                   rests: 15 s, twice as long each time, up to 5 min
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from functools import partial

import asyncpg
import structlog

from upload_pipeline.database.embedding_models import MODEL_CHANGED, commit_refill, note_model_failure
from upload_pipeline.database.queue import ClaimedJob, Executor, Lease, Transition
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.embedding import TRIAL_TEXT
from upload_workers.embedding_line import PutOff
from upload_workers.filling import fill
from upload_workers.models_in_use import ModelInUse
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

log = structlog.get_logger(__name__)

TURN_SECONDS = 20.0
"""After which a job of many texts lets others have its slot."""

PAUSE_SECONDS = 60.0
"""Between two looks while the filling is paused; it is woken when that ends."""

TRIES = 3
"""Of the commit; each finds that the document or the model has changed since the try before."""

TRIAL_SECONDS = 20.0
"""After which the trial counts as not embedded."""

_PROVIDER_FAILS = (ErrorCode.EMBED_FAILED, ErrorCode.EMBED_QUOTA, ErrorCode.EMBED_DENIED)


async def refill(job: ClaimedJob, context: StepContext) -> Outcome:
    """Embeds what lacks a vector; with no model to fill there is nothing to do, and the job ends."""
    try:
        building = await context.models.building()
        if building is not None:
            model, paused = building
            if paused:
                return Snooze(timedelta(seconds=PAUSE_SECONDS))
            await _fill(job, context, model)
    except PutOff as error:
        return error.outcome()
    return Commit(partial(_commit, job, context))


async def _commit(
    job: ClaimedJob, context: StepContext, db: Executor, lease: Lease, *, keep: bool, ttl: timedelta
) -> Transition | Snooze:
    del keep  # the job ends
    for tries_left in reversed(range(TRIES)):
        try:
            return await commit_refill(db, lease, ttl=ttl)
        except asyncpg.PostgresError as error:
            if error.sqlstate != MODEL_CHANGED or not tries_left:
                raise
        context.models.look_again()
        try:
            building = await context.models.building()
            if building is not None:
                await _fill(job, context, building[0])
        except PutOff as error:
            return error.outcome()
    raise AssertionError("the last try returns or raises")


async def _fill(job: ClaimedJob, context: StepContext, model: ModelInUse) -> None:
    """As `fill`, but an outage puts off.

    Raises:
        PutOff: see `fill`; or the provider fails, or failed a moment ago.
        PipelineError: it is the job's own.
    """
    if model.rest.left:
        raise _put_off(model)
    seconds = context.settings.stage_timeout / 2
    try:
        async with asyncio.timeout(seconds) as bound:
            await fill(job, context, model, seconds=TURN_SECONDS)
    except TimeoutError as error:
        if not bound.expired():
            raise
        failure = PipelineError(ErrorCode.EMBED_FAILED, f"The embedder gave nothing within {seconds:g} s.")
        await _after_failure(job, context, model, failure, error)
    except PipelineError as error:
        await _after_failure(job, context, model, error, error)
    else:
        model.rest.end()


async def _after_failure(
    job: ClaimedJob, context: StepContext, model: ModelInUse, failure: PipelineError, cause: Exception
) -> None:
    """Raises what it was, the provider or the job."""
    if failure.code not in _PROVIDER_FAILS or await _embeds_trial(job, model):
        raise failure from (cause if cause is not failure else None)
    if model.rest.begin():
        name = model.facts.name
        log.warning("filling_rests", model=name, error=failure.message, seconds=round(model.rest.left))
        try:
            await note_model_failure(context.db, model=name, failure=failure.message)
        except Exception as error:  # noqa: BLE001 - `models status` does not tell, and nothing else depends on it
            log.warning("model_failure_not_recorded", error=str(error) or type(error).__name__)
    raise _put_off(model) from cause


async def _embeds_trial(job: ClaimedJob, model: ModelInUse) -> bool:
    """Whether the provider embeds a text that nobody objects to. Counted and paid as the job's other texts."""
    try:
        async with asyncio.timeout(TRIAL_SECONDS):
            if model.batcher is None:
                await model.embedder.embed([TRIAL_TEXT])
                return True
            # As of a job that has failed: in a request of its own, that no other text brings down.
            alone = replace(job, retry_count=job.retry_count + 1)
            asked = model.batcher.embed(alone, [TRIAL_TEXT], until=time.monotonic() + TRIAL_SECONDS)
            async with aclosing(asked) as arriving:
                async for _ in arriving:
                    pass
    except (PutOff, PipelineError, TimeoutError):
        return False
    return True


def _put_off(model: ModelInUse) -> PutOff:
    # Spread a little, so that not all come back in the same moment.
    return PutOff(max(model.rest.left, 1.0) * random.uniform(1.0, 1.1))  # noqa: S311
