"""What the steps share: the document's row, a local copy of its bytes, and storing a text of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

from upload_pipeline.database.documents import Document, load_document
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.database.uploads import has_document
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.keys import hosted_output_key, parser_output_key, uploader_of
from upload_workers.steps import StepContext

log = structlog.get_logger(__name__)

MARKDOWN_LIMIT = 256 * 1024 * 1024
"""Most bytes of Markdown that a step holds in memory."""


async def document_of(job: ClaimedJob, context: StepContext) -> Document:
    """The job's document.

    Raises:
        PipelineError: `DOCUMENT_NOT_FOUND`, where it was deleted meanwhile.
    """
    document = await load_document(context.db, job.document_id)
    if document is None:
        message = f"Document {job.document_id} does not exist any more: it was deleted while its job was at work."
        raise PipelineError(ErrorCode.DOCUMENT_NOT_FOUND, message)
    return document


def output_key(document: Document) -> str:
    """Where the output of the document's parser is."""
    uploader = uploader_of(document.raw_key)
    if document.parse_id is not None:
        return hosted_output_key(uploader, document.document_id, document.parse_id)
    return parser_output_key(uploader, document.document_id)


@asynccontextmanager
async def local_copy(document: Document, context: StepContext) -> AsyncGenerator[Path]:
    """The document's bytes as a local file, checked against the size and the sha256 of its row.

    Raises:
        PipelineError: `OBJECT_MISSING`, or `CHECKSUM_MISMATCH` where the store holds other bytes.
    """
    with TemporaryDirectory(dir=context.scratch, prefix="job-") as directory:
        path = Path(directory) / "file"
        stored = await context.store.download(document.raw_key, path)
        if (stored.size, stored.sha256) != (document.file_bytes, document.file_sha256):
            raise other_bytes(document, stored.size, stored.sha256)
        yield path


async def store_text(document: Document, key: str, text: bytes, context: StepContext) -> None:
    """Stores a text of the document, and takes it out again where the document was deleted meanwhile.

    A deletion hides the document and then removes the objects that it finds. One that comes after that would stay, so
    whoever stores one looks at the document again.

    Raises:
        PipelineError: as the store does.
    """
    try:
        await context.store.put_bytes(key, text)
    finally:
        # Also where the task is cancelled: that is how a worker learns that its job was ended.
        await asyncio.shield(asyncio.create_task(_take_out_of_deleted(document, key, text, context)))


async def _take_out_of_deleted(document: Document, key: str, text: bytes, context: StepContext) -> None:
    try:
        if await has_document(context.db, document.raw_key):
            return
        await context.store.delete([key])
        if await has_document(context.db, document.raw_key):
            # Uploaded anew between the two looks: what went may have been the new one's.
            await context.store.put_bytes(key, text)
    except Exception as error:  # noqa: BLE001 - the step goes on or fails by itself; maintenance sweeps
        log.warning("object_left_for_maintenance", key=key, error=str(error) or type(error).__name__)


def other_bytes(document: Document, found_bytes: int, found_sha256: str | None) -> PipelineError:
    """The error of a store that holds other bytes than those of the document."""
    return PipelineError(
        ErrorCode.CHECKSUM_MISMATCH,
        f"The stored bytes of {document.filename!r} are not the ones that were uploaded "
        f"({found_bytes} bytes instead of {document.file_bytes}, or another sha256). Upload the file again.",
        {"key": document.raw_key, "expected": document.file_sha256, "found": found_sha256},
    )
