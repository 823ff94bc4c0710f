"""Stages that only say that the next kind of work begins: chunking, embedding, detection.

They are commits of their own so that an operator sees, and may give a pool of its own to, the work that follows.
"""

from __future__ import annotations

from upload_pipeline.database.queue import ClaimedJob
from upload_workers.steps import Advance, Outcome, StepContext


async def open_step(job: ClaimedJob, context: StepContext) -> Outcome:
    """Goes on."""
    del job, context
    return Advance()
