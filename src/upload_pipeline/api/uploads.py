"""Sending files: the whole file as a form, or an announcement now and the bytes afterwards."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.multipart import MULTIPART
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.public_urls import status_url
from upload_pipeline.api.received_file import accept_form
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources
from upload_pipeline.api.upload_bodies import Upload
from upload_pipeline.errors import ErrorCode, PipelineError

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
        **documented_errors(400, 401, 408, 409, 413, 415, 429),
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
    settings = resources.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MULTIPART:
        raise PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"A body of type {kind or 'unknown'} is not taken here. Send {MULTIPART}, or {JSON} to announce a file.",
            {"content_type": kind, "taken": [MULTIPART, JSON]},
        )
    accepted = await accept_form(
        request,
        resources.intake,
        user_id=principal.user_id,
        correlation_id=correlation_id,
        max_bytes=settings.max_file_bytes,
        seconds=settings.upload_url_seconds + settings.upload_finish_seconds,
    )
    if accepted.duplicate:
        response.status_code = 200
    return Upload(
        document_id=accepted.document_id,
        job_id=accepted.job_id,
        duplicate=accepted.duplicate,
        status_url=status_url(request, settings, accepted.job_id),
    )
