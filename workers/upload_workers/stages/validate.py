"""`queued` -> `job_validated`: the object is there, is what was uploaded, and can be read.

Of a document whose bytes were only announced, the object may still be missing: then the job waits for it.

    nothing                                          Snooze; past the deadline UPLOAD_EXPIRED
    other bytes, older than the latest announcement  the same: they say nothing of it
    other bytes, newer                               CHECKSUM_MISMATCH
    the announced bytes                              whatever the time, the wait is over

They may have come past intake, by a URL of the store, and so past its virus scanner: it sees them here. Infected ones
are removed; while the scanner is away they wait, until the deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from pathlib import Path

import structlog

from upload_pipeline.database.documents import AwaitedBytes, Document
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.database.uploads import commit_validation
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import HEAD_BYTES, detect_media_type
from upload_pipeline.storage.objects import ObjectInfo
from upload_pipeline.storage.virus_scan import PIECE_BYTES
from upload_workers.stages.arrival import not_there, not_yet, show_to_scanner
from upload_workers.stages.source import document_of, local_copy, other_bytes
from upload_workers.steps import Advance, Commit, Outcome, StepContext

log = structlog.get_logger(__name__)


async def validate(job: ClaimedJob, context: StepContext) -> Outcome:
    """Checks size, sha256, type by content, and that the parser can open the file."""
    document = await document_of(job, context)
    if document.awaited is not None:
        return await _look_for_bytes(document, document.awaited, context)
    async with local_copy(document, context) as path:
        await _found_type(document, path)
        await context.parser.inspect(path, document.media_type)
    return Advance()


async def _look_for_bytes(document: Document, awaited: AwaitedBytes, context: StepContext) -> Outcome:
    found = await context.store.head(document.raw_key)
    if found is None:
        return not_there(document.filename, awaited)
    try:
        if found.size != document.file_bytes:
            raise other_bytes(document, found.size, None)
        async with local_copy(document, context) as path:
            async with aclosing(_blocks(path)) as blocks:
                await show_to_scanner(document.filename, document.raw_key, blocks, context)
            media_type = await _found_type(document, path)
            await context.parser.inspect(path, media_type)
    except PipelineError as error:
        if _is_not_theirs(error, found, awaited):
            return not_there(document.filename, awaited)
        if error.code is ErrorCode.SCANNER_UNAVAILABLE and awaited.left > timedelta(0):
            log.warning("scanner_awaited", error=error.message)
            return not_yet(awaited)
        raise
    return Commit(partial(commit_validation, media_type=media_type))


def _is_not_theirs(error: PipelineError, found: ObjectInfo, awaited: AwaitedBytes) -> bool:
    """Whether what was found says nothing of the latest announcement: it is older, or gone again."""
    # Buckets tell times in whole seconds, so what came in the second of the announcement seems to be older than it.
    since = awaited.since if found.modified_at.microsecond else awaited.since.replace(microsecond=0)
    return error.code is ErrorCode.OBJECT_MISSING or (
        error.code is ErrorCode.CHECKSUM_MISMATCH and found.modified_at < since
    )


async def _blocks(path: Path) -> AsyncGenerator[bytes, None]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while block := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield block
    finally:
        await asyncio.to_thread(file.close)


async def _found_type(document: Document, path: Path) -> str:
    def read_head() -> bytes:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)

    head = await asyncio.to_thread(read_head)
    return detect_media_type(document.filename, head, size=document.file_bytes)
