"""`job_validated` -> `parsing`: hand the file to the parser. The local parser is at hand, so nothing is sent."""

from __future__ import annotations

from upload_pipeline.database.queue import ClaimedJob
from upload_workers.steps import Advance, Outcome, StepContext


async def submit(job: ClaimedJob, context: StepContext) -> Outcome:
    """Goes on at once: what is local needs no submission."""
    del job, context
    return Advance()
