"""Insurance policies: sent as a form with what they are, and followed until their knowledge graph is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import structlog
from fastapi import APIRouter, Path, Request, Response

from upload_pipeline.api.error_bodies import documented_errors, error_response, invalid_field
from upload_pipeline.api.jobs import no_such_job
from upload_pipeline.api.multipart import MULTIPART
from upload_pipeline.api.policy_bodies import (
    PolicyAccepted,
    PolicyError,
    PolicyResults,
    PolicyState,
    PolicyStatus,
)
from upload_pipeline.api.principals import CurrentPrincipal, require_role
from upload_pipeline.api.public_urls import public_url
from upload_pipeline.api.received_file import FormField, receive_form
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.failures import DATABASE_FAILURES
from upload_pipeline.database.policies import PolicyFacts, is_policy
from upload_pipeline.database.user_jobs import JobStatus, find_job
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.policies import MAX_TEXT_CHARS, accept_policy, launch_date, policy_terms, policy_text
from upload_pipeline.stages import JobState

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/api/v1/policies", tags=["policies"])

ROLES = ("ADMIN", "FP_MANAGER")

_TEXT_BYTES = 4 * MAX_TEXT_CHARS + 200
"""UTF-8 has at most four bytes for a character; spaces around are let go."""

_NOT_A_POLICY = frozenset({ErrorCode.FILE_TOO_LARGE, ErrorCode.UNSUPPORTED_TYPE, ErrorCode.TYPE_MISMATCH})
"""What is wrong with a file, and 400 here as all that is: other routes give each a status of its own."""


def _of_text(name: str, read: Callable[[str, str], Any]) -> Callable[[bytes], Any]:
    def of_bytes(data: bytes) -> Any:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise invalid_field(name, "it is not UTF-8") from error
        return read(name, text)

    return of_bytes


_FIELDS = {
    "insurer": FormField(_TEXT_BYTES, _of_text("insurer", policy_text)),
    "product_name": FormField(_TEXT_BYTES, _of_text("product_name", policy_text)),
    "launch_date": FormField(_TEXT_BYTES, _of_text("launch_date", launch_date)),
}


@router.post(
    "/ingest",
    status_code=202,
    summary="Send an insurance policy",
    response_model=PolicyAccepted,
    responses={
        200: {
            "model": PolicyAccepted,
            "description": "You had sent the same bytes before: this is what became of them",
        },
        **documented_errors(400, 401, 403, 408, 409, 415, 429, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {MULTIPART: {"schema": {"$ref": "#/components/schemas/PolicyForm"}}},
        }
    },
)
async def ingest_policy(
    request: Request,
    response: Response,
    principal: CurrentPrincipal,
    resources: AppResources,
    correlation_id: CorrelationId,
) -> PolicyAccepted | Response:
    """Needs the role `ADMIN` or `FP_MANAGER`. A file that is not taken is 400 with the reason, and leaves nothing.

    Same bytes of the same user again: 200 with the first job; what is said of the policy now replaces what was said.
    """
    require_role(principal, *ROLES)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MULTIPART:
        raise PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"A body of type {kind or 'unknown'} is not taken here. Send {MULTIPART}.",
            {"content_type": kind, "taken": [MULTIPART]},
        )
    settings = resources.settings
    try:
        async with receive_form(
            request,
            resources.intake,
            user_id=principal.user_id,
            correlation_id=correlation_id,
            terms=policy_terms(settings.max_policy_bytes),
            fields=_FIELDS,
            seconds=settings.upload_url_seconds + settings.upload_finish_seconds,
        ) as form:
            _require_all(form.values)
            accepted = await accept_policy(resources.intake, form.staged, PolicyFacts(**form.values))
    except PipelineError as error:
        if error.code in _NOT_A_POLICY:
            return error_response(_reason(error, settings.max_policy_bytes), correlation_id, status=400)
        raise
    if accepted.job_id is None:
        raise RuntimeError(f"policy {accepted.document_id} has no job")
    job = await _where_it_stands(resources, principal.user_id, accepted.job_id)
    finish = job.estimated_completion_at if job else None
    if accepted.duplicate:
        response.status_code = 200
    return PolicyAccepted(
        job_id=accepted.job_id,
        document_id=accepted.document_id,
        status=_state(job) if job else PolicyState.PENDING,
        estimated_completion_time=finish,
        estimated_completion_minutes=_minutes_until(finish) if finish else None,
        status_url=public_url(request, settings, f"{router.prefix}/ingest/status/{accepted.job_id}"),
    )


@router.get(
    "/ingest/status/{job_id}",
    summary="How far a policy is",
    responses=documented_errors(400, 401, 404, 429),
)
async def read_policy_status(
    job_id: Annotated[
        UUID, Path(description="Of a policy of yours.", examples=["6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"])
    ],
    principal: CurrentPrincipal,
    resources: AppResources,
) -> PolicyStatus:
    """Of policies only; `GET /api/v2/jobs/{job_id}` tells more, and of every job of yours."""
    async with as_user(resources.db, principal.user_id) as connection:
        job = await find_job(connection, job_id, default_seconds=resources.settings.estimate_seconds)
        if job is None or job.document_id is None or not await is_policy(connection, job.document_id):
            raise no_such_job(job_id)
    state = _state(job)
    failed = state is PolicyState.FAILED
    results = job.results or {}
    return PolicyStatus(
        job_id=job.job_id,
        status=state,
        progress=job.progress,
        results=PolicyResults(
            nodes_created=results.get("nodes_created", 0),
            edges_created=results.get("edges_created", 0),
            errors=[PolicyError(code=job.error["code"], message=job.error["message"])] if job.error else [],
        ),
        error_message=(job.error["message"] if job.error else "The job was cancelled.") if failed else None,
        created_at=job.created_at,
        updated_at=job.updated_at,
        completed_at=job.finished_at,
        estimated_completion_time=job.estimated_completion_at,
    )


def _require_all(values: Any) -> None:
    missing = [name for name in _FIELDS if name not in values]
    if missing:
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            f"The request does not validate: missing: {', '.join(missing)}.",
            {"fields": [{"field": name, "problem": "it is missing"} for name in missing]},
        )


def _reason(error: PipelineError, max_bytes: int) -> PipelineError:
    if error.code is not ErrorCode.FILE_TOO_LARGE:
        return error
    message = f"The file is larger than the {max_bytes} bytes that a policy may have. Send a smaller one."
    return PipelineError(error.code, message, {**error.details, "max_bytes": max_bytes})


async def _where_it_stands(resources: Resources, user_id: UUID, job_id: UUID) -> JobStatus | None:
    """None where that cannot be told: the policy is accepted all the same."""
    try:
        async with as_user(resources.db, user_id) as connection:
            return await find_job(connection, job_id, default_seconds=resources.settings.estimate_seconds)
    except DATABASE_FAILURES as error:
        log.warning("estimate_missing", job_id=job_id, error=str(error) or type(error).__name__)
        return None


def _state(job: JobStatus) -> PolicyState:
    match JobState(job.state):
        case JobState.DONE:
            return PolicyState.COMPLETED
        case JobState.DEADLETTER | JobState.CANCELLED:
            return PolicyState.FAILED
        case JobState.QUEUED if job.started_at is None:
            return PolicyState.PENDING
        case _:
            return PolicyState.PROCESSING


def _minutes_until(moment: datetime) -> int:
    return max(0, math.ceil((moment - datetime.now(UTC)).total_seconds() / 60))
