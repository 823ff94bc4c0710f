"""`queued` -> `filled` of pipeline `reembed`: a document's live chunks get vectors of the model that is being filled.

Nothing is parsed or cut: the stored texts are embedded. Searches do not see the vectors before the model is active.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import asyncpg

from upload_pipeline.database.embedding_models import MODEL_CHANGED, commit_refill
from upload_pipeline.database.queue import ClaimedJob, Executor, Lease, Transition
from upload_workers.embedding_line import PutOff
from upload_workers.filling import fill
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

TURN_SECONDS = 20.0
"""After which a job of many texts lets others have its slot."""

PAUSE_SECONDS = 60.0
"""Between two looks while the filling is paused; it is woken when that ends."""

TRIES = 3
"""Of the commit; each finds that the document or the model has changed since the try before."""


async def refill(job: ClaimedJob, context: StepContext) -> Outcome:
    """Embeds what lacks a vector; with no model to fill there is nothing to do, and the job ends."""
    try:
        building = await context.models.building()
        if building is not None:
            model, paused = building
            if paused:
                return Snooze(timedelta(seconds=PAUSE_SECONDS))
            await fill(job, context, model, seconds=TURN_SECONDS)
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
                await fill(job, context, building[0], seconds=TURN_SECONDS)
        except PutOff as error:
            return error.outcome()
    raise AssertionError("the last try returns or raises")
