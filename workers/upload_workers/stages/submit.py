"""`job_validated` -> `parsing`: hand the file to the parser. The local parser is at hand, so nothing is sent to it."""

from __future__ import annotations

from functools import partial

from upload_pipeline.database.parse_submissions import commit_submission
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.embedding_line import PutOff
from upload_workers.stages.source import document_of
from upload_workers.steps import Advance, Commit, Outcome, StepContext


async def submit(job: ClaimedJob, context: StepContext) -> Outcome:
    """Goes on at once where the file is parsed here; else with the hosted parser's id of the parse."""
    hosted = context.hosted_parser
    if hosted is None or not hosted.takes_new:
        return Advance()
    document = await document_of(job, context)
    if not hosted.takes(document):
        return Advance()
    try:
        submission_id, parse_id = await hosted.submit(job, document, context)
    except PutOff as error:
        return error.outcome()
    return Commit(partial(commit_submission, submission_id=submission_id, parse_id=parse_id))
