"""A photo's bytes, sent and fetched by URLs that carry their own permission: for stores that cannot sign URLs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.limits import within_byte_limits
from upload_pipeline.api.object_streams import stream_object
from upload_pipeline.api.received_file import ending_within
from upload_pipeline.api.resources import AppResources
from upload_pipeline.api.upload_bytes import check_headers
from upload_pipeline.database.photos import has_photo
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.photos import EXTENSIONS, no_such_photo, receive_photo
from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.photo_keys import PhotoObject, parse_photo_key
from upload_pipeline.storage.signed_urls import MAX_TOKEN_CHARS, Grant, invalid_url

router = APIRouter(prefix="/api/v1/photos", tags=["photos"])

_BODY = {
    "requestBody": {
        "required": True,
        "description": "The photo, exactly as it was announced, under the `Content-Type` that `headers` names.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

PhotoOfUrl = Annotated[UUID, Path(description="Of the photo that the URL was made for.")]
Token = Annotated[str, Query(min_length=1, max_length=MAX_TOKEN_CHARS, description="The permission; it expires.")]


@router.put(
    "/{photo_id}/bytes",
    status_code=204,
    summary="Send the bytes of an announced photo, by a signed URL",
    responses=documented_errors(400, 403, 404, 408, 409, 411, 429, 507),
    openapi_extra=_BODY,
)
async def put_photo_bytes(request: Request, photo_id: PhotoOfUrl, resources: AppResources, token: Token) -> None:
    """The `upload_url` of `POST /api/v1/photos/upload-url`: no credentials, for a quarter of an hour, for just these.

    Another type or length is refused, nothing of it is kept, and the right bytes can still be sent. The photo is
    `uploaded` then, and its job looks at them at once; until it has, they can be sent again.
    """
    now = datetime.now(UTC)
    grant = _granted(resources, token, photo_id, "PUT", now)
    if grant.file_bytes is None:
        raise invalid_url()
    await within_byte_limits(resources, photo_id)
    check_headers(request.headers, grant, grant.file_bytes)
    async with ending_within((grant.expires_at - now).total_seconds() + resources.settings.upload_finish_seconds):
        await receive_photo(
            resources.intake,
            photo_id=photo_id,
            file_bytes=grant.file_bytes,
            raw_key=grant.key,
            chunks=request.stream(),
        )


@router.get(
    "/{photo_id}/bytes",
    summary="A photo or its thumbnail, by a signed URL",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The bytes that the URL was made for",
            "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in EXTENSIONS},
        },
        **documented_errors(400, 403, 404, 409),
    },
)
async def read_photo_bytes(photo_id: PhotoOfUrl, resources: AppResources, token: Token) -> Response:
    """The `download_url` and the `thumbnail_url` of a photo: no credentials, for a few minutes.

    404 once the photo is deleted.
    """
    grant = _granted(resources, token, photo_id, "GET", datetime.now(UTC))
    if not await has_photo(resources.db, photo_id):
        raise no_such_photo(photo_id)
    headers = {
        "Content-Type": grant.media_type or "application/octet-stream",
        "Content-Disposition": attachment(grant.filename or "photo"),
        "Accept-Ranges": "none",
    }
    try:
        return await stream_object(resources.store, grant.key, headers)
    except PipelineError as error:
        if error.code is ErrorCode.OBJECT_MISSING and not await has_photo(resources.db, photo_id):
            raise no_such_photo(photo_id) from error
        raise


def _granted(resources: AppResources, token: str, photo_id: UUID, method: str, now: datetime) -> Grant:
    grant = resources.signer.verify(token, method=method, now=now)
    key = parse_photo_key(grant.key)
    # a photo's key names it: a URL of a document is none of a photo
    if key is None or key.photo_id != photo_id or grant.document_id != photo_id:
        raise invalid_url()
    if method == "PUT" and key.kind is not PhotoObject.RAW:
        raise invalid_url()
    return grant
