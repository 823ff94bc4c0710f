"""What the steps share: the document's row, and a local copy of its bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from upload_pipeline.database.documents import Document, load_document
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_workers.steps import StepContext

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


def other_bytes(document: Document, found_bytes: int, found_sha256: str | None) -> PipelineError:
    """The error of a store that holds other bytes than those of the document."""
    return PipelineError(
        ErrorCode.CHECKSUM_MISMATCH,
        f"The stored bytes of {document.filename!r} are not the ones that were uploaded "
        f"({found_bytes} bytes instead of {document.file_bytes}, or another sha256). Upload the file again.",
        {"key": document.raw_key, "expected": document.file_sha256, "found": found_sha256},
    )
