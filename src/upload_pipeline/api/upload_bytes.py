"""The bytes of an announced file, by a URL that carries its own permission: for stores that cannot sign URLs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request

from upload_pipeline.api.error_bodies import documented_errors, invalid_field
from upload_pipeline.api.limits import within_byte_limits
from upload_pipeline.api.received_file import ending_within
from upload_pipeline.api.resources import AppResources
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.receive import receive_upload
from upload_pipeline.storage.signed_urls import MAX_TOKEN_CHARS, invalid_url

if TYPE_CHECKING:
    from starlette.datastructures import Headers

    from upload_pipeline.storage.signed_urls import Grant

router = APIRouter(prefix="/api/v2/upload", tags=["uploads"])

# Of any of five types, and always of the one that was announced. Makers of clients know but one name for raw bytes.
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The file, exactly as it was announced, under the `Content-Type` that `upload_headers` names.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.put(
    "/{document_id}/bytes",
    status_code=204,
    summary="Send the bytes of an announced file, by a signed URL",
    responses=documented_errors(400, 403, 404, 408, 409, 411, 415, 429, 507),
    openapi_extra=_BODY,
)
async def put_bytes(
    request: Request,
    document_id: Annotated[UUID, Path(description="Of the document that the URL was made for.")],
    resources: AppResources,
    token: Annotated[str, Query(min_length=1, max_length=MAX_TOKEN_CHARS, description="The permission; it expires.")],
) -> None:
    """The `upload_url` of `POST /api/v2/upload`: no credentials, for a quarter of an hour, for just these bytes.

    Length, type and sha256 are checked; other bytes are refused, nothing of them is kept, and the right ones can still
    be sent. Sending them again changes nothing. The job starts as soon as they are there.
    """
    now = datetime.now(UTC)
    grant = resources.signer.verify(token, method="PUT", now=now)
    if grant.document_id != document_id or grant.file_bytes is None or grant.file_sha256 is None:
        raise invalid_url()
    await within_byte_limits(resources, document_id)
    check_headers(request.headers, grant, grant.file_bytes)
    left = (grant.expires_at - now).total_seconds() + resources.settings.upload_finish_seconds
    async with ending_within(left):
        await receive_upload(
            resources.intake,
            document_id=document_id,
            file_bytes=grant.file_bytes,
            file_sha256=grant.file_sha256,
            chunks=request.stream(),
        )


def check_headers(headers: Headers, grant: Grant, file_bytes: int) -> None:
    """Sees that a request announces the length and the type that its URL was made for.

    Raises:
        PipelineError: `LENGTH_REQUIRED`; `INVALID_ARGUMENT` naming the header.
    """
    length = headers.get("content-length", "")
    if not length.isdecimal():
        raise PipelineError(
            ErrorCode.LENGTH_REQUIRED,
            f"The header Content-Length is missing. Send it: {file_bytes} bytes were announced.",
            {"announced_bytes": file_bytes},
        )
    if int(length) != file_bytes:
        raise invalid_field("Content-Length", f"it is {int(length)}, and {file_bytes} bytes were announced")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != grant.media_type:
        raise invalid_field("Content-Type", f"it is {kind or 'missing'}, and {grant.media_type} was announced")
