"""`embeddings_buffered` -> `embedded`: the new set of chunks takes the old one's place, and the document is found.

All of it is one transaction of the database. It is refused where another embedding model has become the active one
since the chunks were embedded, or a vector that was paid for has been forgotten; then what is lacking is embedded, here
and now.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import asyncpg

from upload_pipeline.database.documents import commit_embeddings
from upload_pipeline.database.embedding_models import MODEL_CHANGED
from upload_pipeline.database.queue import ClaimedJob, Executor, Lease, Transition
from upload_workers.embedding_line import PutOff
from upload_workers.filling import fill
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

TRIES = 3
"""Of the commit; each finds another active model than the one before, or that vectors are forgotten."""


async def publish(job: ClaimedJob, context: StepContext) -> Outcome:
    """Commits by the model that is active at that moment."""
    return Commit(partial(_commit, job, context))


async def _commit(
    job: ClaimedJob, context: StepContext, db: Executor, lease: Lease, *, keep: bool, ttl: timedelta
) -> Transition | Snooze:
    try:
        for tries_left in reversed(range(TRIES)):
            active = await context.models.active()
            try:
                return await commit_embeddings(db, lease, model=active.facts.name, keep=keep, ttl=ttl)
            except asyncpg.PostgresError as error:
                if error.sqlstate != MODEL_CHANGED or not tries_left:
                    raise
            context.models.look_again()
            await fill(job, context, await context.models.active(), seconds=context.settings.stage_timeout / 2)
    except PutOff as error:
        return error.outcome()
    raise AssertionError("the last try returns or raises")
