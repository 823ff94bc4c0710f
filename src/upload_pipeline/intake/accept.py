"""Taking a file in: checked, stored, and made a document with a job, or refused with nothing left of it.

stage -> known bytes? -> opens? -> move to raw/… -> row, job and event in one statement
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from upload_pipeline.database import documents
from upload_pipeline.database.documents import AcceptedDocument
from upload_pipeline.intake.arrival import check_arrival
from upload_pipeline.intake.placing import (
    addressed,
    bring_back,
    confirm_placed,
    find_known,
    place,
    until_answered,
    withdraw,
)
from upload_pipeline.intake.staging import (
    Intake,
    StagedFile,
    Terms,
    finish,
    open_staged,
    stage_path,
    stage_stream,
)


async def accept_file(
    intake: Intake,
    *,
    chunks: AsyncIterator[bytes],
    filename: str,
    user_id: UUID,
    metadata: Mapping[str, Any],
    correlation_id: str,
    priority: int = 0,
    terms: Terms | None = None,
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
        terms: what is taken; None: any known type up to `intake.max_bytes`.

    Raises:
        PipelineError: `INVALID_METADATA`, `INVALID_ARGUMENT`, `FILE_TOO_LARGE`, `EMPTY_FILE`, `UNSUPPORTED_TYPE`,
            `TYPE_MISMATCH`; what `inspect` raises; `INVALID_STATE` while a document with the same bytes is being
            deleted; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`, `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`.
    """
    arrival = check_arrival(filename, user_id, metadata, correlation_id, priority)
    async with stage_stream(intake, chunks=chunks, arrival=arrival, terms=terms or Terms(intake.max_bytes)) as staged:
        return await accept_staged(intake, staged)


async def accept_path(
    intake: Intake,
    *,
    path: Path,
    user_id: UUID,
    metadata: Mapping[str, Any],
    correlation_id: str,
    priority: int = 0,
    terms: Terms | None = None,
) -> AcceptedDocument:
    """Takes a file of this machine in; otherwise as `accept_file`. Nothing is stored of a file that is refused.

    Args:
        intake: database, store, limits.
        path: a regular file, or a symbolic link to one; its name is the document's.
        user_id: the owner.
        metadata: see `check_metadata`.
        correlation_id: stands on every event and log line that follows; at most 200 characters.
        priority: of the job within its user's, -32768 to 32767, highest first.
        terms: what is taken; None: any known type up to `intake.max_bytes`.

    Raises:
        PipelineError: `FILE_NOT_FOUND`; `FILE_UNREADABLE` for a directory, pipe, device or a file without
            permission; `FILE_CHANGED` for one that is written to meanwhile; and as `accept_file` does.
    """
    arrival = check_arrival(path.name, user_id, metadata, correlation_id, priority)
    async with stage_path(intake, path=path, arrival=arrival, terms=terms or Terms(intake.max_bytes)) as staged:
        return await accept_staged(intake, staged)


async def accept_staged(intake: Intake, staged: StagedFile) -> AcceptedDocument:
    """Makes a document and its job of a staged file, or gives back the ones there are; otherwise as `accept_file`.

    To be called while what staged it is entered: leaving that by this function's exception removes what was staged.
    """
    first = await find_known(intake, staged)
    staged = await addressed(intake, staged)
    if first is not None:
        await bring_back(intake, staged)
        return first
    return await place_and_record(intake, staged, lambda: _make_document(intake, staged))


async def place_and_record(
    intake: Intake, staged: StagedFile, record: Callable[[], Awaitable[AcceptedDocument]]
) -> AcceptedDocument:
    """Opens a staged file, puts its bytes in place and makes its rows; where one of these fails nothing is left.

    Args:
        intake: as for `accept_file`.
        staged: while what staged it is entered.
        record: the statement that makes the rows; it may be repeated after a lost connection.
    """
    await open_staged(intake, staged)
    try:
        await place(intake, staged)
        accepted = await until_answered(intake, record, f"accept {staged.arrival.filename!r}")
    except BaseException:
        await finish(withdraw(intake, staged))
        raise
    await confirm_placed(intake, staged)
    return accepted


async def _make_document(intake: Intake, staged: StagedFile) -> AcceptedDocument:
    arrival = staged.arrival
    return await documents.accept_document(
        intake.db,
        document_id=staged.document_id,
        user_id=arrival.user_id,
        filename=arrival.filename,
        media_type=staged.media_type,
        file_bytes=staged.size,
        file_sha256=staged.sha256,
        raw_key=staged.raw_key,
        metadata=arrival.metadata,
        priority=arrival.priority,
        correlation_id=arrival.correlation_id,
    )
