"""Jobs as their owner sees them: where they stand, and what may be done about them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import asyncpg
from fastapi import APIRouter, Body, Path, Query
from pydantic import AfterValidator, BeforeValidator

from upload_pipeline.api.cursors import decode_cursor, encode_cursor
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.job_bodies import Job, JobCancelled, JobPage, JobRestarted, RetryRequest
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database import queue, user_jobs
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.user_jobs import JobFilter, JobStatus
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.stages import JobState

router = APIRouter(prefix="/api/v2/jobs", tags=["jobs"])

MAX_PAGE = 100

JobId = Annotated[UUID, Path(description="Of a job of yours.", examples=["6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"])]


def _written_out(value: object) -> object:
    """A bare number would be taken for seconds since 1970, and a year for the first hour of that."""
    if isinstance(value, str) and value.strip().lstrip("+-").replace(".", "", 1).isdecimal():
        raise ValueError("a time as 2026-11-21T09:00:00Z (RFC 3339) is needed")
    return value


def _in_utc(moment: datetime) -> datetime:
    """A time without a zone is one of UTC, as all times here; what Postgres cannot hold is refused."""
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError as error:
        raise ValueError("out of range") from error


Moment = Annotated[datetime, BeforeValidator(_written_out), AfterValidator(_in_utc)]
Name = Annotated[str, Query(max_length=100, pattern=r"^[a-z][a-z0-9_]*$")]


@router.get("", summary="Your jobs, newest first", responses=documented_errors(400, 401, 429))
async def list_jobs(
    principal: CurrentPrincipal,
    resources: AppResources,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    stage: Annotated[Name | None, Query(description="Only jobs at this stage.")] = None,
    pipeline: Annotated[Name | None, Query(description="Only jobs of this pipeline.")] = None,
    batch_id: Annotated[UUID | None, Query(description="Only jobs of this batch.")] = None,
    created_from: Annotated[Moment | None, Query(description="Only jobs made at this moment or later.")] = None,
    created_to: Annotated[Moment | None, Query(description="Only jobs made before this moment.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most jobs of the page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None,
) -> JobPage:
    """Page by page: pass `next_cursor` as `cursor` until it is null. Jobs made meanwhile do not shift the pages."""
    before = decode_cursor(cursor) if cursor is not None else None
    async with as_user(resources.db, principal.user_id, by_index=True) as connection:
        found = await user_jobs.list_jobs(
            connection,
            JobFilter(state, stage, pipeline, batch_id, created_from, created_to),
            # One more than asked for tells whether there are more.
            limit=limit + 1,
            before=before,
            default_seconds=resources.settings.estimate_seconds,
        )
    page = found[:limit]
    more = encode_cursor(page[-1].created_at, page[-1].job_id) if len(found) > limit else None
    return JobPage(items=[Job.model_validate(job) for job in page], next_cursor=more)


@router.get("/{job_id}", summary="Where a job stands", responses=documented_errors(400, 401, 404, 429))
async def read_job(job_id: JobId, principal: CurrentPrincipal, resources: AppResources) -> Job:
    """Rather than ask often, follow `GET /api/v2/jobs/{job_id}/events` with `Accept: text/event-stream`."""
    return Job.model_validate(await _owned_job(resources, principal.user_id, job_id))


@router.post(
    "/{job_id}/retry", summary="Start an ended job again", responses=documented_errors(400, 401, 404, 409, 429)
)
async def retry_job(
    job_id: JobId,
    principal: CurrentPrincipal,
    resources: AppResources,
    correlation_id: CorrelationId,
    request: Annotated[RetryRequest | None, Body()] = None,
) -> JobRestarted:
    """Of a job that is `deadletter` or `cancelled`; with `from_stage` also of one that is `done`. Else 409."""
    await _owned_job(resources, principal.user_id, job_id)
    try:
        restarted = await queue.retry_job(
            resources.db,
            job_id,
            from_stage=request.from_stage if request else None,
            correlation_id=correlation_id,
        )
    except asyncpg.PostgresError as error:
        raise _refused(error, await _owned_job(resources, principal.user_id, job_id)) from error
    return JobRestarted.model_validate(restarted)


@router.post("/{job_id}/cancel", summary="Stop a job", responses=documented_errors(400, 401, 404, 409, 429))
async def cancel_job(
    job_id: JobId, principal: CurrentPrincipal, resources: AppResources, correlation_id: CorrelationId
) -> JobCancelled:
    """A waiting job stops at once, a working one at its next step or heartbeat; cancelling twice is cancelling once.

    Of a job that has ended otherwise: 409 with its state.
    """
    job = await _owned_job(resources, principal.user_id, job_id)
    try:
        state, requested = await queue.cancel_job(resources.db, job_id, correlation_id=correlation_id)
    except asyncpg.PostgresError as error:
        raise _refused(error, job) from error
    if state in (JobState.DONE, JobState.DEADLETTER):
        raise PipelineError(
            ErrorCode.INVALID_STATE,
            f"Job {job_id} is {state}: there is nothing to stop.",
            {"job_id": str(job_id), "state": state, "stage": job.stage},
        )
    return JobCancelled(job_id=job_id, state=JobState(state), cancel_requested=requested)


async def _owned_job(resources: Resources, user_id: UUID, job_id: UUID) -> JobStatus:
    async with as_user(resources.db, user_id) as connection:
        job = await user_jobs.find_job(connection, job_id, default_seconds=resources.settings.estimate_seconds)
    if job is None:
        raise no_such_job(job_id)
    return job


def no_such_job(job_id: UUID) -> PipelineError:
    """The error for a job that is not there or somebody else's: one and the same."""
    return PipelineError(
        ErrorCode.JOB_NOT_FOUND,
        f"There is no job {job_id}. `GET /api/v2/jobs` lists those that there are.",
        {"job_id": str(job_id)},
    )


_CODES = {
    queue.NOT_FOUND: ErrorCode.JOB_NOT_FOUND,
    queue.INVALID_STATE: ErrorCode.INVALID_STATE,
    queue.INVALID_STAGE: ErrorCode.INVALID_STAGE,
}


def _refused(error: asyncpg.PostgresError, job: JobStatus) -> Exception:
    code = _CODES.get(error.sqlstate or "")
    if code is None:
        unnamed: Exception = error
        return unnamed
    if code is ErrorCode.JOB_NOT_FOUND:
        # Deleted between the look and the verb.
        return no_such_job(job.job_id)
    message = str(error.args[0]).rstrip(".")
    hint = getattr(error, "hint", None)
    return PipelineError(
        code,
        f"{message[:1].upper()}{message[1:]}." + (f" {hint}" if hint else ""),
        {"job_id": str(job.job_id), "state": job.state, "stage": job.stage},
    )
