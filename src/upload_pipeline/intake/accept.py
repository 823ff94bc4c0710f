"""Taking a file in: checked, stored, and made a document with a job, or refused with nothing left of it.

    stream to incoming/… -> type -> known bytes? -> opens? -> move to raw/… -> row, job and event in one statement

A file of this machine is measured and opened where it lies, and streamed only when nothing speaks against it.

Two intakes of the same bytes share one raw key, and so do an intake and the deletion of an older document of the
same bytes. An object is therefore removed only when the database says that no document has it, and whoever removes
one looks at the database again after, as whoever gets a document looks at the object again after. Whichever comes
last sees the other, and puts the bytes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from uuid import UUID, uuid4

import structlog

from upload_pipeline import ids
from upload_pipeline.database import documents
from upload_pipeline.database.documents import AcceptedDocument
from upload_pipeline.database.failures import DATABASE_FAILURES, translate
from upload_pipeline.database.queue import Executor
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.arrival import Arrival, check_arrival
from upload_pipeline.intake.local_file import changed, measure, read_blocks, too_large
from upload_pipeline.media_types import HEAD_BYTES, detect_media_type
from upload_pipeline.storage.keys import incoming_key, raw_key
from upload_pipeline.storage.store import ObjectStore

log = structlog.get_logger(__name__)

RETRY_PAUSE = 0.25
"""Seconds between two tries of the statement that makes the row."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Intake:
    """What taking files in needs.

    Attributes:
        db: as role `upload_worker`.
        store: where the bytes go.
        inspect: opens a local file of a media type to see that it can be read; raises `PipelineError` (`ENCRYPTED`,
            `CORRUPT_FILE`, …) where it cannot.
        max_bytes: largest file that is taken.
        scratch: directory for local copies; made where it is missing.
        retry_seconds: how long a database that is away is waited for once the bytes are in place.
    """

    db: Executor
    store: ObjectStore
    inspect: Callable[[Path, str], Awaitable[None]]
    max_bytes: int
    scratch: Path
    retry_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class _File:
    """A file whose bytes are known: size in bytes, sha256 in hexadecimal, a local path to the same bytes."""

    arrival: Arrival
    media_type: str
    size: int
    sha256: str
    local: Path

    @property
    def document_id(self) -> UUID:
        return ids.document_id(self.arrival.user_id, self.sha256)

    @property
    def raw_key(self) -> str:
        return raw_key(self.arrival.user_id, self.document_id)


async def accept_file(
    intake: Intake,
    *,
    chunks: AsyncIterator[bytes],
    filename: str,
    user_id: UUID,
    metadata: Mapping[str, Any],
    correlation_id: str,
    priority: int = 0,
) -> AcceptedDocument:
    """Takes a file in as it arrives; memory does not grow with it.

    Same user and same bytes again: the first document is given back, with `duplicate` set. Safe to repeat after any
    failure. A failure leaves no row and no object, except that an object whose document the database cannot be asked
    about is left for maintenance, as is what a killed process leaves.

    Args:
        intake: database, store, limits.
        chunks: the bytes; what this raises comes out unchanged.
        filename: as the sender named it; shown and stored as `display_name` makes it.
        user_id: the owner.
        metadata: see `check_metadata`.
        correlation_id: stands on every event and log line that follows; at most 200 characters.
        priority: of the job within its user's, -32768 to 32767, highest first.

    Raises:
        PipelineError: `INVALID_METADATA`, `INVALID_ARGUMENT`, `FILE_TOO_LARGE`, `EMPTY_FILE`, `UNSUPPORTED_TYPE`,
            `TYPE_MISMATCH`; what `inspect` raises; `INVALID_STATE` while a document with the same bytes is being
            deleted; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`, `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`.
    """
    arrival = check_arrival(filename, user_id, metadata, correlation_id, priority)
    incoming = incoming_key(uuid4())
    async with _removed_on_failure(intake.store, incoming):
        try:
            stored = await intake.store.put_stream(incoming, chunks, max_bytes=intake.max_bytes, head_bytes=HEAD_BYTES)
        except PipelineError as error:
            if error.code is ErrorCode.FILE_TOO_LARGE:
                raise too_large(arrival.filename, intake.max_bytes) from error
            raise
        media_type = detect_media_type(arrival.filename, stored.head, size=stored.size)
        with _scratch_directory(intake) as directory:
            file = _File(arrival, media_type, stored.size, stored.sha256, Path(directory) / "file")
            first = await _find_first(intake, file)
            if first is not None:
                if await intake.store.head(file.raw_key) is None:
                    await intake.store.move(incoming, file.raw_key)
                else:
                    await intake.store.delete([incoming])
                return first
            await intake.store.download(incoming, file.local)
            await intake.inspect(file.local, media_type)
            return await _place(intake, file, incoming)


async def accept_path(
    intake: Intake,
    *,
    path: Path,
    user_id: UUID,
    metadata: Mapping[str, Any],
    correlation_id: str,
    priority: int = 0,
) -> AcceptedDocument:
    """Takes a file of this machine in; otherwise as `accept_file`. Nothing is stored of a file that is refused.

    Args:
        intake: database, store, limits.
        path: a regular file, or a symbolic link to one; its name is the document's.
        user_id: the owner.
        metadata: see `check_metadata`.
        correlation_id: stands on every event and log line that follows; at most 200 characters.
        priority: of the job within its user's, -32768 to 32767, highest first.

    Raises:
        PipelineError: `FILE_NOT_FOUND`; `FILE_UNREADABLE` for a directory, pipe, device or a file without
            permission; `FILE_CHANGED` for one that is written to meanwhile; and as `accept_file` does.
    """
    arrival = check_arrival(path.name, user_id, metadata, correlation_id, priority)
    measured = await measure(path, max_bytes=intake.max_bytes)
    media_type = detect_media_type(arrival.filename, measured.head, size=measured.size)
    file = _File(arrival, media_type, measured.size, measured.sha256, path)
    first = await _find_first(intake, file)
    if first is not None:
        if await intake.store.head(file.raw_key) is None:
            await _put_again(intake, file)
        return first
    await intake.inspect(path, media_type)
    incoming = incoming_key(uuid4())
    async with _removed_on_failure(intake.store, incoming):
        await _put_same_bytes(intake, file, incoming)
        return await _place(intake, file, incoming)


async def _place(intake: Intake, file: _File, incoming: str) -> AcceptedDocument:
    """Moves the bytes to their key and makes the row; undoes the move where there will be no row."""
    try:
        await intake.store.move(incoming, file.raw_key)
        accepted = await _make_document(intake, file)
    except BaseException:
        await _finish(_withdraw(intake, file))
        raise
    try:
        if await intake.store.head(file.raw_key) is None:
            await _put_again(intake, file)
    except PipelineError as error:
        # The document is accepted, and its job will say so should the object be missing.
        log.warning("object_not_confirmed", key=file.raw_key, error=str(error))
    return accepted


async def _make_document(intake: Intake, file: _File) -> AcceptedDocument:
    """Tries for `retry_seconds`: after a lost connection the row may be there, and the same statement finds it."""
    arrival = file.arrival
    give_up = time.monotonic() + intake.retry_seconds
    while True:
        try:
            return await _named(
                documents.accept_document(
                    intake.db,
                    document_id=file.document_id,
                    user_id=arrival.user_id,
                    filename=arrival.filename,
                    media_type=file.media_type,
                    file_bytes=file.size,
                    file_sha256=file.sha256,
                    raw_key=file.raw_key,
                    metadata=arrival.metadata,
                    priority=arrival.priority,
                    correlation_id=arrival.correlation_id,
                ),
                f"accept {arrival.filename!r}",
            )
        except PipelineError as error:
            if error.code is not ErrorCode.DATABASE_UNAVAILABLE or time.monotonic() + RETRY_PAUSE >= give_up:
                raise
            log.warning("accept_retried", filename=arrival.filename, error=error.message)
        await asyncio.sleep(RETRY_PAUSE)


async def _withdraw(intake: Intake, file: _File) -> None:
    """Removes the raw object if no document has it."""
    try:
        if await _has_document(intake, file):
            return
        await intake.store.delete([file.raw_key])
        if await _has_document(intake, file):
            await _put_again(intake, file)
    except Exception as error:  # noqa: BLE001 - the failure that led here is the one to report; maintenance sweeps
        log.warning("object_left_for_maintenance", key=file.raw_key, error=str(error) or type(error).__name__)


async def _has_document(intake: Intake, file: _File) -> bool:
    try:
        return await _find_first(intake, file) is not None
    except PipelineError as error:
        if error.code is ErrorCode.INVALID_STATE:  # it is being deleted, and its object with it
            return False
        raise


async def _find_first(intake: Intake, file: _File) -> AcceptedDocument | None:
    return await _named(
        documents.find_duplicate(intake.db, user_id=file.arrival.user_id, file_sha256=file.sha256),
        f"look up {file.arrival.filename!r}",
    )


async def _put_again(intake: Intake, file: _File) -> None:
    incoming = incoming_key(uuid4())
    async with _removed_on_failure(intake.store, incoming):
        await _put_same_bytes(intake, file, incoming)
        await intake.store.move(incoming, file.raw_key)


async def _put_same_bytes(intake: Intake, file: _File, key: str) -> None:
    try:
        stored = await intake.store.put_stream(key, read_blocks(file.local), max_bytes=file.size, head_bytes=0)
    except PipelineError as error:
        if error.code is ErrorCode.FILE_TOO_LARGE:  # it has grown
            raise changed(file.local) from error
        raise
    if stored.sha256 != file.sha256:
        raise changed(file.local)


async def _named(statement: Awaitable[T], action: str) -> T:
    try:
        return await statement
    except DATABASE_FAILURES as error:
        raise translate(error, action) from error


@asynccontextmanager
async def _removed_on_failure(store: ObjectStore, key: str) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await _finish(_remove(store, key))
        raise


async def _remove(store: ObjectStore, key: str) -> None:
    try:
        await store.delete([key])
    except PipelineError as error:
        log.warning("object_left_for_maintenance", key=key, error=str(error))


async def _finish(cleanup: Coroutine[Any, Any, None]) -> None:
    """Lets a clean-up end though the task that asked for it is cancelled once more."""
    await asyncio.shield(asyncio.create_task(cleanup))


def _scratch_directory(intake: Intake) -> TemporaryDirectory[str]:
    intake.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Maintenance clears what begins with job- once it is old: a killed process leaves its copy.
    return TemporaryDirectory(dir=intake.scratch, prefix="job-intake-")
