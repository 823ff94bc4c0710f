"""Batches: up to a hundred files in one request, with their metadata, and what became of each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any
from uuid import UUID, uuid4

import structlog
from fastapi import APIRouter, Path, Request

from upload_pipeline.api.batch_bodies import (
    BatchAccepted,
    BatchProgress,
    BatchRetried,
    FailedDocument,
    RetriedDocument,
)
from upload_pipeline.api.batch_form import BatchFormTerms, announced_bytes, receive_batch
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.limits import batch_bucket, require_room_for_jobs, take
from upload_pipeline.api.multipart import MULTIPART
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.public_urls import public_url
from upload_pipeline.api.received_file import ending_within
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database import batches
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.batches import BatchStatus
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.archive import ArchiveLimits
from upload_pipeline.intake.batch import BatchTerms, accept_batch, incoming_batch
from upload_pipeline.intake.staging import scratch_directory
from upload_pipeline.logs import log_fields
from upload_pipeline.settings import Settings

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/api/v1/documents/ingest/batch", tags=["batches"])

BatchId = Annotated[UUID, Path(description="Of a batch of yours.", examples=["0192f0c4-6a1e-7b11-9c55-2f4d7c9a1b30"])]

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {MULTIPART: {"schema": {"$ref": "#/components/schemas/BatchForm"}}},
    }
}


@router.post(
    "",
    status_code=202,
    summary="Send up to 100 files with their metadata",
    responses=documented_errors(400, 401, 408, 413, 415, 429, 507),
    openapi_extra=_BODY,
)
async def ingest_batch(
    request: Request, principal: CurrentPrincipal, resources: AppResources, correlation_id: CorrelationId
) -> BatchAccepted:
    """Answers as soon as all bytes are stored. A file that fails its checks is a failed document of the batch.

    PDF, DOCX, TXT, Markdown and HTML, told by content. Whatever fails the request leaves nothing of any file.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MULTIPART:
        raise PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"A body of type {kind or 'unknown'} is not taken here. Send {MULTIPART}.",
            {"content_type": kind, "taken": [MULTIPART]},
        )
    settings, intake, batch_id = resources.settings, resources.intake, uuid4()
    log_fields.set({**log_fields.get(), "batch_id": batch_id})
    form_terms = _terms(settings, partial(take, resources.db, batch_bucket(settings, str(principal.user_id))))
    async with resources.admissions.admitted(announced_bytes(request, form_terms), correlation_id):
        log.info("batch_started", bytes=request.headers.get("content-length"))
        with scratch_directory(intake) as scratch:
            async with incoming_batch(intake, user_id=principal.user_id, correlation_id=correlation_id) as files:
                async with ending_within(settings.upload_url_seconds + settings.upload_finish_seconds):
                    received = await receive_batch(request, files, scratch, form_terms)
                await require_room_for_jobs(resources, principal.user_id, await files.opened())
                members = await accept_batch(
                    files,
                    batch_id,
                    BatchTerms(
                        received.mapping,
                        settings.max_mapping_bytes,
                        required=settings.batch_required_fields,
                        warnings=received.warnings,
                    ),
                )
    refused = sum(member.error_code is not None for member in members)
    told = f" {refused} of them {'was' if refused == 1 else 'were'} refused; the status says why." if refused else ""
    return BatchAccepted.model_validate(
        {
            "batch_id": batch_id,
            "total_documents": len(members),
            "status": "in_progress",
            "message": f"{len(members)} {'file was' if len(members) == 1 else 'files were'} taken.{told}",
            "status_url": public_url(request, settings, f"{router.prefix}/{batch_id}/status"),
        }
    )


@router.get("/{batch_id}/status", summary="How far a batch is", responses=documented_errors(400, 401, 404, 429))
async def read_batch_status(batch_id: BatchId, principal: CurrentPrincipal, resources: AppResources) -> BatchProgress:
    """Counted from the files' own jobs whenever it is asked for, so the counts always add up."""
    return _progress(await _owned_batch(resources, principal.user_id, batch_id))


@router.post(
    "/{batch_id}/retry", summary="Start the failed files again", responses=documented_errors(400, 401, 404, 429)
)
async def retry_batch(
    batch_id: BatchId, principal: CurrentPrincipal, resources: AppResources, correlation_id: CorrelationId
) -> BatchRetried:
    """Each where it stopped. A file that was refused cannot be retried, since nothing of it was kept: send it again."""
    before = await _owned_batch(resources, principal.user_id, batch_id)
    restartable = sum(failed.job_id is not None for failed in before.failed_members)
    await require_room_for_jobs(resources, principal.user_id, restartable)
    found = await batches.retry_batch(resources.db, batch_id, correlation_id=correlation_id)
    retried = sum(one.retried for one in found)
    log.info("batch_retried", batch_id=batch_id, retried=retried)
    status = await _owned_batch(resources, principal.user_id, batch_id)
    return BatchRetried.model_validate(
        {
            "batch_id": batch_id,
            "retried": retried,
            "status": status.status,
            "documents": [RetriedDocument.model_validate(one) for one in found],
        }
    )


@router.delete("/{batch_id}", summary="Stop a batch", responses=documented_errors(400, 401, 404, 429))
async def cancel_batch(
    batch_id: BatchId, principal: CurrentPrincipal, resources: AppResources, correlation_id: CorrelationId
) -> BatchProgress:
    """Files that wait stop at once, files at work at their next step; what is done stays. Safe to repeat.

    Jobs that the same bytes had before this batch go on: they are not its own.
    """
    await _owned_batch(resources, principal.user_id, batch_id)
    stopped = await batches.cancel_batch(resources.db, batch_id, correlation_id=correlation_id)
    log.info("batch_cancelled", batch_id=batch_id, stopped=stopped)
    return _progress(await _owned_batch(resources, principal.user_id, batch_id))


def _terms(settings: Settings, before_file: Callable[[], Awaitable[None]]) -> BatchFormTerms:
    return BatchFormTerms(
        max_bytes=settings.max_batch_bytes,
        max_mapping_bytes=settings.max_mapping_bytes,
        archive=ArchiveLimits(settings.max_batch_bytes, settings.max_archive_entries, settings.max_archive_ratio),
        before_file=before_file,
    )


async def _owned_batch(resources: Resources, user_id: UUID, batch_id: UUID) -> BatchStatus:
    async with as_user(resources.db, user_id) as connection:
        found = await batches.find_batch(connection, batch_id, default_seconds=resources.settings.estimate_seconds)
    if found is None:
        raise PipelineError(
            ErrorCode.BATCH_NOT_FOUND, f"There is no batch {batch_id}. Check the id.", {"batch_id": str(batch_id)}
        )
    return found


def _progress(status: BatchStatus) -> BatchProgress:
    return BatchProgress.model_validate(
        {
            "batch_id": status.batch_id,
            "total_documents": status.total,
            "processed_count": status.processed,
            "failed_count": status.failed,
            "status": status.status,
            "failed_documents": [FailedDocument.model_validate(failed) for failed in status.failed_members],
            "warnings": list(status.warnings),
            "estimated_completion_time": status.estimated_completion_at,
            "completed_at": status.completed_at,
            "processing_time_seconds": round(status.seconds, 3),
        }
    )
