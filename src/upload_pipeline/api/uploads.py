"""Sending files: the whole file as a form, or an announcement now and the bytes afterwards."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response

from upload_pipeline.api.announcements import read_announcement, sign_target
from upload_pipeline.api.documents import DocumentId, owned_document
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.multipart import MULTIPART
from upload_pipeline.api.principals import CurrentPrincipal, Principal
from upload_pipeline.api.public_urls import status_url
from upload_pipeline.api.received_file import accept_form
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.api.upload_bodies import Upload, UploadCompleted
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.receive import announce_upload
from upload_pipeline.intake.reserve import reserve_upload
from upload_pipeline.intake.staging import Terms
from upload_pipeline.stages import JobState

router = APIRouter(prefix="/api/v2/upload", tags=["uploads"])

JSON = "application/json"

_BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": {"$ref": "#/components/schemas/UploadRequest"}},
            MULTIPART: {
                "schema": {"$ref": "#/components/schemas/UploadForm"},
                "encoding": {"metadata": {"contentType": JSON}},
            },
        },
    }
}


@router.post(
    "",
    status_code=202,
    summary="Send a file, or announce one",
    responses={
        200: {"model": Upload, "description": "You had sent the same bytes before: this is what became of them"},
        **documented_errors(400, 401, 408, 409, 413, 415, 429, 507),
    },
    openapi_extra=_BODIES,
)
async def upload(
    request: Request,
    response: Response,
    principal: CurrentPrincipal,
    resources: AppResources,
    correlation_id: CorrelationId,
) -> Upload:
    """With a form the file comes at once. With JSON it is announced, and its bytes go to `upload_url` afterwards.

    PDF, DOCX, TXT, Markdown and HTML, told by content. Same bytes of the same user again: 200, `duplicate` is true, and
    nothing is stored or processed twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == MULTIPART:
        told = await _take(request, resources, principal.user_id, correlation_id)
    elif kind == JSON:
        told = await _announce(request, resources, principal, correlation_id)
    else:
        raise PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"A body of type {kind or 'unknown'} is not taken here. Send {MULTIPART}, or {JSON} to announce a file.",
            {"content_type": kind, "taken": [MULTIPART, JSON]},
        )
    if told.duplicate:
        response.status_code = 200
    return told


@router.post(
    "/{document_id}/complete",
    summary="Say that the bytes of an announced file are there",
    responses=documented_errors(400, 401, 404, 409, 429),
)
async def complete_upload(
    request: Request, document_id: DocumentId, principal: CurrentPrincipal, resources: AppResources
) -> UploadCompleted:
    """The job then looks for them now rather than at its next look. Nobody has to say it, and saying it twice is fine.

    409 `OBJECT_MISSING` while the bytes are not there.
    """
    document = await owned_document(resources, principal.user_id, document_id)
    if await resources.store.head(document.raw_key) is None:
        raise PipelineError(
            ErrorCode.OBJECT_MISSING,
            f"The bytes of {document.filename!r} are not there. Send them to the upload_url, or announce the file "
            "again for another one.",
            {"document_id": str(document_id)},
        )
    await announce_upload(resources.intake, document_id=document_id)
    job = (await owned_document(resources, principal.user_id, document_id)).job
    return UploadCompleted(
        document_id=document_id,
        job_id=job.job_id if job else None,
        stage=job.stage if job else None,
        state=JobState(job.state) if job else None,
        status_url=status_url(request, resources.settings, job.job_id if job else None),
    )


async def _take(request: Request, resources: Resources, user_id: UUID, correlation_id: str) -> Upload:
    settings = resources.settings
    accepted = await accept_form(
        request,
        resources.intake,
        user_id=user_id,
        correlation_id=correlation_id,
        max_bytes=settings.max_file_bytes,
        seconds=settings.upload_url_seconds + settings.upload_finish_seconds,
    )
    return Upload(
        document_id=accepted.document_id,
        job_id=accepted.job_id,
        duplicate=accepted.duplicate,
        status_url=status_url(request, settings, accepted.job_id),
    )


async def _announce(request: Request, resources: Resources, principal: Principal, correlation_id: str) -> Upload:
    settings = resources.settings
    wanted = await read_announcement(request)
    reserved = await reserve_upload(
        resources.intake,
        filename=wanted.filename,
        file_bytes=wanted.bytes_len,
        media_type=wanted.mime,
        file_sha256=wanted.sha256,
        user_id=principal.user_id,
        metadata=wanted.metadata,
        correlation_id=correlation_id,
        window=timedelta(seconds=settings.upload_url_seconds + settings.upload_finish_seconds),
        terms=Terms(settings.max_file_bytes),
    )
    told = Upload(
        document_id=reserved.document_id,
        job_id=reserved.job_id,
        duplicate=reserved.duplicate,
        status_url=status_url(request, settings, reserved.job_id),
    )
    if reserved.duplicate:
        return told
    target = await sign_target(request, resources, principal, reserved, wanted)
    return told.model_copy(
        update={
            "upload_url": target.url,
            "upload_method": "PUT",
            "upload_headers": target.headers,
            "upload_expires_at": target.expires_at,
        }
    )
