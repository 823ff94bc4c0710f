"""Documents as their owner sees them: what there is, its text, its chunks, and letting go of it."""

from __future__ import annotations

import json
import unicodedata
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from upload_pipeline.api.cursors import decode_cursor, encode_cursor
from upload_pipeline.api.document_bodies import MARKDOWN_EXAMPLE, Chunk, ChunkPage, Document, DocumentPage, Download
from upload_pipeline.api.download_urls import download_url
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.object_streams import stream_object
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database import user_documents
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.deletion import delete_document
from upload_pipeline.database.documents import DeletedDocument
from upload_pipeline.database.user_documents import DocumentFilter, UserDocument
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.metadata import check_metadata
from upload_pipeline.stages import JobState
from upload_pipeline.storage.document_objects import remove_document_objects

router = APIRouter(prefix="/api/v2/documents", tags=["documents"])

MAX_PAGE = 100
MAX_FILTER_CHARS = 4000

MARKDOWN_TYPE = "text/markdown; charset=utf-8"

DocumentId = Annotated[
    UUID, Path(description="Of a document of yours.", examples=["0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49"])
]
Name = Annotated[str, Query(max_length=100, pattern=r"^[a-z][a-z0-9_]*$")]
ChunkCursor = Annotated[str, Query(pattern=r"^[0-9]{1,9}$")]

_ETAG = {"ETag": {"description": "The text's sha256, quoted.", "schema": {"type": "string"}}}


@router.get("", summary="Your documents, newest first", responses=documented_errors(400, 401, 429))
async def list_documents(
    principal: CurrentPrincipal,
    resources: AppResources,
    state: Annotated[JobState | None, Query(description="Only documents whose newest job is in this state.")] = None,
    stage: Annotated[Name | None, Query(description="Only documents whose newest job is at this stage.")] = None,
    filename: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=255,
            pattern=r"^[^\x00]*$",
            description="Only documents whose name contains this, in upper or lower case.",
        ),
    ] = None,
    metadata: Annotated[
        str | None,
        Query(
            max_length=MAX_FILTER_CHARS,
            description="Only documents whose metadata contain this object (JSON containment).",
            examples=['{"department": "claims"}'],
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most documents of the page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None,
) -> DocumentPage:
    """Page by page: pass `next_cursor` as `cursor` until it is null. Documents that come meanwhile shift no page."""
    before = decode_cursor(cursor) if cursor is not None else None
    wanted = DocumentFilter(
        state,
        stage,
        None if filename is None else unicodedata.normalize("NFC", filename),
        None if metadata is None else _containment(metadata),
    )
    async with as_user(resources.db, principal.user_id, by_index=True) as connection:
        # One more than asked for tells whether there are more.
        found = await user_documents.list_documents(connection, wanted, limit=limit + 1, before=before)
    page = found[:limit]
    more = encode_cursor(page[-1].created_at, page[-1].document_id) if len(found) > limit else None
    return DocumentPage(items=[Document.model_validate(document) for document in page], next_cursor=more)


@router.get("/{document_id}", summary="A document and its newest job", responses=documented_errors(400, 401, 404, 429))
async def read_document(document_id: DocumentId, principal: CurrentPrincipal, resources: AppResources) -> Document:
    """Until it is processed its job says where it stands: follow `GET /api/v2/jobs/{job_id}/events`."""
    return Document.model_validate(await owned_document(resources, principal.user_id, document_id))


@router.get(
    "/{document_id}/markdown",
    summary="A document's text as Markdown",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The text that chunks are cut from, in UTF-8; their spans count its characters",
            "headers": _ETAG,
            "content": {"text/markdown": {"schema": {"type": "string"}, "example": MARKDOWN_EXAMPLE}},
        },
        304: {"description": "The text is the one that `If-None-Match` names", "headers": _ETAG},
        **documented_errors(400, 401, 404, 409, 429),
    },
)
async def read_markdown(
    request: Request, document_id: DocumentId, principal: CurrentPrincipal, resources: AppResources
) -> Response:
    """409 `DOCUMENT_NOT_READY` until the file has been parsed. `If-None-Match` has it sent only where it changed."""
    missing: str | None = None
    while True:
        document = await owned_document(resources, principal.user_id, document_id)
        if document.markdown_key is None:
            raise _not_ready(document, "It has not been parsed yet")
        if document.markdown_key == missing:
            raise lost(document_id)
        tag = f'"{document.markdown_sha256}"'
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
        if _names(request.headers.getlist("If-None-Match"), tag):
            return Response(status_code=304, headers=headers)
        headers["Content-Type"] = MARKDOWN_TYPE
        try:
            return await stream_object(resources.store, document.markdown_key, headers)
        except PipelineError as error:
            if error.code is not ErrorCode.OBJECT_MISSING:
                raise
            # Lost; or since the look the document was deleted, or another text has taken the place of this one.
            missing = document.markdown_key


@router.get(
    "/{document_id}/chunks", summary="A document's chunks, in order", responses=documented_errors(400, 401, 404, 429)
)
async def list_chunks(
    document_id: DocumentId,
    principal: CurrentPrincipal,
    resources: AppResources,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most chunks of the page.")] = 50,
    cursor: Annotated[ChunkCursor | None, Query(description="`next_cursor` of the page before.")] = None,
) -> ChunkPage:
    """What searches find: nothing before the document is searchable, the old ones while it is processed again."""
    async with as_user(resources.db, principal.user_id, by_index=True) as connection:
        found = await user_documents.list_chunks(
            connection, document_id, after=-1 if cursor is None else int(cursor), limit=limit + 1
        )
    if found is None:
        raise no_such_document(document_id)
    page = found[:limit]
    more = str(page[-1].ordinal) if len(found) > limit else None
    return ChunkPage(items=[Chunk.model_validate(chunk) for chunk in page], next_cursor=more)


@router.get(
    "/{document_id}/download",
    summary="A URL that a document's bytes are fetched by",
    responses=documented_errors(400, 401, 404, 409, 429),
)
async def download_document(
    request: Request, document_id: DocumentId, principal: CurrentPrincipal, resources: AppResources
) -> Download:
    """The URL needs no credentials and expires soon. 409 `DOCUMENT_NOT_READY` while the file's bytes are awaited.

    409 `OBJECT_MISSING` once they are gone: a bucket's rule may end them while the document stays.
    """
    document = await owned_document(resources, principal.user_id, document_id)
    if document.upload_deadline is not None:
        raise _not_ready(document, "Its bytes have not come yet")
    if await resources.store.head(document.raw_key) is None:
        # The store would say so itself at the URL, but not what it means.
        raise lost_file(document_id)
    url, expires_at = await download_url(
        request,
        resources,
        principal,
        document_id=document_id,
        raw_key=document.raw_key,
        filename=document.filename,
        media_type=document.media_type,
    )
    return Download(
        download_url=url,
        expires_at=expires_at,
        filename=document.filename,
        media_type=document.media_type,
        file_bytes=document.file_bytes,
    )


@router.delete(
    "/{document_id}",
    summary="Delete a document",
    status_code=204,
    responses=documented_errors(400, 401, 404, 429),
)
async def remove_document(
    document_id: DocumentId, principal: CurrentPrincipal, resources: AppResources, correlation_id: CorrelationId
) -> None:
    """The file, its text, its chunks and vectors, its jobs; a job at work is stopped. There is no way back.

    Safe to repeat: what was begun and broke off (503) is ended by the next call, or else by the workers within some
    minutes, and nothing shows the document meanwhile. Once it is gone it is like one that never was: 404.
    """
    async with as_user(resources.db, principal.user_id) as connection:
        known = await user_documents.is_there(connection, document_id)
    if not known and not await user_documents.is_being_deleted(resources.db, document_id, principal.user_id):
        raise no_such_document(document_id)

    async def remove_objects(deleted: DeletedDocument) -> None:
        await remove_document_objects(resources.store, document_id=deleted.document_id, raw_key=deleted.raw_key)

    await delete_document(resources.db, document_id, remove_objects, correlation_id=correlation_id)


def no_such_document(document_id: UUID) -> PipelineError:
    """The error for a document that is not there, is being deleted, or is somebody else's: one and the same."""
    return PipelineError(
        ErrorCode.DOCUMENT_NOT_FOUND,
        f"There is no document {document_id}. `GET /api/v2/documents` lists those that there are.",
        {"document_id": str(document_id)},
    )


async def owned_document(resources: Resources, user_id: UUID, document_id: UUID) -> UserDocument:
    """A document of the user.

    Raises:
        PipelineError: `DOCUMENT_NOT_FOUND`, also where it is somebody else's.
    """
    async with as_user(resources.db, user_id) as connection:
        document = await user_documents.find_document(connection, document_id)
    if document is None:
        raise no_such_document(document_id)
    return document


def _not_ready(document: UserDocument, problem: str) -> PipelineError:
    job = document.job
    details: dict[str, Any] = {"document_id": str(document.document_id)}
    if job is None:
        advice = "Upload the file again."
    else:
        details |= {"job_id": str(job.job_id), "state": job.state, "stage": job.stage}
        advice = f"Its job is {job.state} at stage {job.stage}: `GET /api/v2/jobs/{job.job_id}` tells more."
    return PipelineError(ErrorCode.DOCUMENT_NOT_READY, f"Document {document.document_id}: {problem}. {advice}", details)


def lost(document_id: UUID) -> PipelineError:
    """The error for a document that is there and whose object is not."""
    return PipelineError(
        ErrorCode.OBJECT_MISSING,
        f"What was stored of document {document_id} is not there any more. Delete the document and upload it again.",
        {"document_id": str(document_id)},
    )


def lost_file(document_id: UUID) -> PipelineError:
    """The error for a document whose file, as it was uploaded, is not in the store."""
    return PipelineError(
        ErrorCode.OBJECT_MISSING,
        f"The file of document {document_id} is not kept any more; what was made of it still is. Send the file again "
        "as a form, and the document has it back.",
        {"document_id": str(document_id)},
    )


def _names(headers: list[str], tag: str) -> bool:
    """Whether `If-None-Match` names the tag, by weak comparison (RFC 9110, section 13.1.2)."""
    named = {given.strip().removeprefix("W/") for header in headers for given in header.split(",")}
    return tag in named or "*" in named


def _containment(text: str) -> str:
    try:
        wanted = json.loads(text)
        return json.dumps(check_metadata(wanted), ensure_ascii=False)
    except (ValueError, RecursionError):
        problem = "is not JSON"
    except PipelineError as error:
        problem = f"is not metadata: {error.message}"
    raise PipelineError(
        ErrorCode.INVALID_ARGUMENT,
        f"metadata {problem}",
        {"fields": [{"field": "metadata", "problem": problem}]},
    )
