"""The step at `parsing` of a document that a hosted parser has: look, and come back, until it has ended.

    what the look finds                              the job
    it is too early, and no webhook has told of it   Snooze
    at work, within `LLAMAPARSE_PARSE_TIMEOUT`       Snooze, longer each time
    no answer, or none that can be read              the same: a look costs nothing
    at work, or no answer, behind that time          PARSE_TIMEOUT
    no room for a look within the limits             Snooze; PARSE_TIMEOUT behind that time, and
                                                     `LLAMAPARSE_WAIT_TIMEOUT`
    ended with pages                                 parsed, once they are in the store
    some pages, or all, failed                       a warning, or PARSE_FAILED
    failed, cancelled, no longer kept                PARSE_FAILED; tried again, it is submitted anew

No lease is held between two looks, and the provider's webhook ends the wait early.

A worker without a key leaves the document to those that have one, as while a fleet gets its key, or keeps it for some
of its workers. It goes on with all else: of its pool's jobs few need the key, and perhaps nobody has it any more. That
is told, as `SETTING_INVALID`, when nobody has had an answer of the provider for the time that a parse may take.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import structlog

from upload_pipeline.database.documents import Document, commit_parse
from upload_pipeline.database.parse_submissions import (
    StoredSubmission,
    load_submission,
    load_wait,
    store_submission,
)
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.llamaparse_results import FinishedParse, ParseError, Remedy, version_of, warnings_of
from upload_workers.embedding_line import PutOff
from upload_workers.hosted_parse import HostedParser
from upload_workers.stages.source import output_key
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

log = structlog.get_logger(__name__)

LONGEST_WAIT = 60.0
"""Seconds between two looks; the wait is half of the time that has passed, from the setting `LLAMAPARSE_POLL` on."""


async def follow_parse(job: ClaimedJob, document: Document, parse_id: str, context: StepContext) -> Outcome:
    """Looks once.

    Raises:
        PipelineError: `PARSE_FAILED`, `PARSE_TIMEOUT`, `PARSE_REJECTED`; `SETTING_INVALID` where there is no key.
    """
    submission = await load_submission(context.db, document_id=document.document_id, parse_id=parse_id)
    if submission is None:
        raise PipelineError(ErrorCode.PARSE_FAILED, f"Nothing is known of the parse {parse_id}. {_REMEDY}")
    if submission.finished and await context.store.head(output_key(document)) is not None:
        return _commit(submission, submission.page_count or 0, submission.failed_pages, context)
    hosted = context.hosted_parser
    if hosted is None:
        return await _leave_to_others(submission, context)
    try:
        if submission.failed:
            return await _submit_anew(job, document, hosted, context)
        return await _look(job, document, submission, hosted, context)
    except PutOff as error:
        return error.outcome()


_REMEDY = "Or retry it from stage job_validated, which parses the document as the setting PARSER says."


async def _leave_to_others(submission: StoredSubmission, context: StepContext) -> Outcome:
    wait, settings = await load_wait(context.db, submission.submission_id), context.settings
    if wait.silence >= settings.llamaparse_parse_timeout or wait.seconds >= settings.llamaparse_wait_timeout:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"LlamaParse has the document, as job {submission.parse_id}, this worker has no key for it, and none came "
            f"that has one. Set UPLOAD_PIPELINE_LLAMAPARSE_API_KEY and retry the job. {_REMEDY}",
            {"parse_id": submission.parse_id},
        )
    log.warning("parse_not_here", parse_id=submission.parse_id)
    first = settings.llamaparse_poll
    return Snooze(timedelta(seconds=first if submission.told else max(first, min(submission.age / 2, LONGEST_WAIT))))


async def _submit_anew(job: ClaimedJob, document: Document, hosted: HostedParser, context: StepContext) -> Outcome:
    if not hosted.takes(document):
        message = f"The LlamaParse job {document.parse_id} failed, and PARSER is not llamaparse any more. {_REMEDY}"
        raise PipelineError(ErrorCode.PARSE_FAILED, message, {"parse_id": document.parse_id})
    submission_id, parse_id = await hosted.submit(job, document, context)
    await store_submission(context.db, job.lease, submission_id, parse_id)
    return Snooze(timedelta(seconds=context.settings.llamaparse_poll))


async def _look(
    job: ClaimedJob, document: Document, submission: StoredSubmission, hosted: HostedParser, context: StepContext
) -> Outcome:
    first, limit = context.settings.llamaparse_poll, context.settings.llamaparse_parse_timeout
    if submission.age < first and not submission.told:
        return Snooze(timedelta(seconds=first - submission.age))
    finished: FinishedParse | None = None
    what = "has not ended"
    try:
        finished = await hosted.look(job, submission, context)
    except ParseError as error:
        if error.remedy is not Remedy.AGAIN:
            raise
        what = f"cannot be looked at ({error.message})"
        log.warning("look_failed", parse_id=submission.parse_id, error=error.message)
    if finished is not None:
        await hosted.keep(job, document, submission, finished, context)
        return _commit(submission, finished.page_count, finished.failed_pages, context)
    if submission.age >= limit:
        raise PipelineError(
            ErrorCode.PARSE_TIMEOUT,
            f"The LlamaParse job {submission.parse_id} {what} {submission.age:.0f} s after it was submitted; the limit "
            f"UPLOAD_PIPELINE_LLAMAPARSE_PARSE_TIMEOUT is {limit:g} s. A retry looks again, and a retry from stage "
            "job_validated submits the document anew, which is paid for again.",
            {"parse_id": submission.parse_id, "seconds": round(submission.age)},
        )
    # The last look is the one at the limit.
    wait = min(max(submission.age / 2, first), LONGEST_WAIT, max(limit - submission.age, first))
    return Snooze(timedelta(seconds=wait))


def _commit(
    submission: StoredSubmission, page_count: int, failed_pages: tuple[int, ...], context: StepContext
) -> Commit:
    taken = context.settings.llamaparse_failed_pages
    warnings = warnings_of(submission.parse_id, page_count=page_count, failed_pages=failed_pages, taken=taken)
    parser = version_of(submission.tier, submission.version)
    return Commit(partial(commit_parse, parser=parser, page_count=page_count, warnings=warnings))
