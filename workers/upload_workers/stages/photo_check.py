"""`pending_upload` -> `uploaded`: the object is there, as long as was announced, and begins as its type does.

    nothing             Snooze; past the deadline UPLOAD_EXPIRED
    another length      CHECKSUM_MISMATCH
    another type        TYPE_MISMATCH
    the announced       whatever the time, the wait is over

The bytes may have come past this service, by a URL of the store, and so past its virus scanner: it sees them here.
Infected ones are removed; while the scanner is away they wait, until the deadline.
"""

from __future__ import annotations

from contextlib import aclosing
from datetime import timedelta

import structlog

from upload_pipeline.database.documents import AwaitedBytes
from upload_pipeline.database.photos import Photo
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.photo_types import check_photo_type
from upload_pipeline.storage.failures import missing
from upload_workers.stages.arrival import not_there, not_yet, show_to_scanner
from upload_workers.stages.photo_source import photo_of
from upload_workers.steps import Advance, Outcome, StepContext

log = structlog.get_logger(__name__)

_HEAD_BYTES = 16
"""More than tells the type."""


async def photo_check(job: ClaimedJob, context: StepContext) -> Outcome:
    """Waits for the bytes and looks at their length and their beginning; `photo_extract` reads them as a whole."""
    photo = await photo_of(job, context)
    if photo.awaited is not None:
        return await _look_for_bytes(photo, photo.awaited, context)
    # Checked before, and started again: what is there now may be the copy without its place.
    key = photo.shared_key or photo.raw_key
    if await context.store.head(key) is None:
        raise missing(key)
    return Advance()


async def _look_for_bytes(photo: Photo, awaited: AwaitedBytes, context: StepContext) -> Outcome:
    found = await context.store.head(photo.raw_key)
    if found is None:
        return not_there(photo.file_name, awaited)
    if found.size != photo.file_bytes:
        raise PipelineError(
            ErrorCode.CHECKSUM_MISMATCH,
            f"{photo.file_name!r} has {found.size:,} bytes and was announced with {photo.file_bytes:,}. Ask for "
            "another upload URL and send the photo again.",
            {"key": photo.raw_key, "expected": photo.file_bytes, "found": found.size},
        )
    try:
        async with aclosing(context.store.stream(photo.raw_key)) as blocks:
            await show_to_scanner(photo.file_name, photo.raw_key, blocks, context)
        check_photo_type(await _head(photo, context), photo.media_type)
    except PipelineError as error:
        if error.code is ErrorCode.OBJECT_MISSING:
            return not_there(photo.file_name, awaited)
        if error.code is ErrorCode.SCANNER_UNAVAILABLE and awaited.left > timedelta(0):
            log.warning("scanner_awaited", error=error.message)
            return not_yet(awaited)
        raise
    return Advance()


async def _head(photo: Photo, context: StepContext) -> bytes:
    head = b""
    async with aclosing(context.store.stream(photo.raw_key)) as blocks:
        async for block in blocks:
            head += block
            if len(head) >= _HEAD_BYTES:
                break
    return head
