"""A document's bytes by a URL that carries its own permission: for stores that cannot sign URLs themselves."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from starlette.responses import StreamingResponse

from upload_pipeline.api.documents import lost_file, no_such_document
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.object_streams import stream_object
from upload_pipeline.api.resources import AppResources
from upload_pipeline.database.user_documents import find_file
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import MEDIA_TYPES
from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.signed_urls import MAX_TOKEN_CHARS, invalid_url

router = APIRouter(prefix="/api/v2/documents", tags=["documents"])


@router.get(
    "/{document_id}/bytes",
    summary="A document's bytes, by a signed URL",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The file as it was uploaded",
            "headers": {
                "Content-Disposition": {
                    "description": "`attachment`, with the file's name.",
                    "schema": {"type": "string"},
                    "example": 'attachment; filename="homeowners-policy.pdf"',
                }
            },
            "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES},
        },
        **documented_errors(400, 403, 404, 409),
    },
)
async def read_bytes(
    document_id: Annotated[UUID, Path(description="Of the document that the URL was made for.")],
    resources: AppResources,
    token: Annotated[str, Query(min_length=1, max_length=MAX_TOKEN_CHARS, description="The permission; it expires.")],
) -> Response:
    """The `download_url` of `GET /api/v2/documents/{document_id}/download`: no credentials, for a few minutes.

    A download that began in time goes on to its end. A document that was deleted meanwhile is 404.
    """
    grant = resources.signer.verify(token, method="GET", now=datetime.now(UTC))
    if grant.document_id != document_id:
        raise invalid_url()
    file = await find_file(resources.db, document_id, grant.key)
    if file is None:
        raise no_such_document(document_id)
    headers = {
        "Content-Type": file.media_type,
        "Content-Length": str(file.file_bytes),
        "Content-Disposition": attachment(file.filename),
        "Accept-Ranges": "none",
    }
    try:
        return await stream_object(resources.store, file.raw_key, headers)
    except PipelineError as error:
        if error.code is not ErrorCode.OBJECT_MISSING:
            raise
        if await find_file(resources.db, document_id, grant.key) is None:
            raise no_such_document(document_id) from error
        raise lost_file(document_id) from error
