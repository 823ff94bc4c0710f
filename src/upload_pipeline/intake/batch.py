"""Several files taken in together: streamed to the store one after the other, then made documents in one transaction.

    each file: stage -> opens? (while the next one comes)     all: metadata -> move to raw/… -> rows, jobs and events

A file that fails its checks is a failed member of the batch. Whatever else fails leaves no row and no object of any of
them; a killed process leaves objects that maintenance sweeps.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import structlog

from upload_pipeline.database import batches
from upload_pipeline.database.batches import BatchMember, RefusedFile, StoredFile
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.batch_files import AT_ONCE, BatchFile, BatchFiles
from upload_pipeline.intake.mapping import MappedMetadata, read_mapping
from upload_pipeline.intake.metadata import check_metadata
from upload_pipeline.intake.placing import addressed, confirm_placed, place, until_answered, withdraw
from upload_pipeline.intake.staging import Intake, StagedFile, discard, finish

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BatchTerms:
    """What is said of all files of a batch.

    Attributes:
        mapping: CSV or JSON with the files' metadata, or None.
        max_mapping_bytes: limit of the mapping.
        required: fields that each file must have.
        common: metadata of every file; what the mapping says goes before it.
        warnings: to be told with the batch's status.
    """

    mapping: bytes | None
    max_mapping_bytes: int
    required: Sequence[str] = ()
    common: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


@asynccontextmanager
async def incoming_batch(intake: Intake, *, user_id: UUID, correlation_id: str) -> AsyncGenerator[BatchFiles]:
    """Files to be added and accepted while entered. Left by an exception, nothing of them stays."""
    async with AsyncExitStack() as stack:
        files = BatchFiles(intake, user_id, correlation_id, stack)
        try:
            yield files
        finally:
            # before what was staged goes: nothing reads it then
            await finish(files.stop_opening())


async def accept_batch(files: BatchFiles, batch_id: UUID, terms: BatchTerms) -> list[BatchMember]:
    """Makes the batch of all files that have come, with their documents, jobs and events; one transaction.

    To be called while `incoming_batch` is entered: leaving that by this function's exception removes what was staged.
    Bytes that the user has sent before, or twice in the batch, are the first document and its job.

    Args:
        files: at least one.
        batch_id: drawn by the caller.
        terms: metadata and warnings.

    Raises:
        PipelineError: `INVALID_MAPPING`; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`, `STORAGE_UNAVAILABLE`,
            `STORAGE_DENIED`, `INSUFFICIENT_STORAGE`, `SCANNER_UNAVAILABLE`.
    """
    intake = files.intake
    await files.opened()
    mapped = await asyncio.to_thread(
        read_mapping,
        terms.mapping,
        filenames=[file.arrival.filename for file in files.files],
        max_bytes=terms.max_mapping_bytes,
        required=terms.required,
    )
    for file in files.files:
        await _give_metadata(files, file, mapped, terms.common)
    await _together(_address(intake, file) for file in files.files)
    warnings = [*_same_names(files.files), *mapped.warnings, *terms.warnings]
    # of the same bytes twice the first
    unlike = {file.staged.sha256: file.staged for file in reversed(files.files) if file.staged is not None}
    try:
        await _together(place(intake, staged) for staged in unlike.values())
        members = await until_answered(
            intake,
            lambda: batches.create_batch(
                intake.db,
                batch_id=batch_id,
                user_id=files.user_id,
                files=[_row(file) for file in files.files],
                warnings=warnings,
                correlation_id=files.correlation_id,
            ),
            f"make the batch of {len(files.files)} files",
        )
    except BaseException:
        await finish(_together(withdraw(intake, staged) for staged in unlike.values()))
        raise
    await _confirm(files, members, unlike)
    _log(batch_id, members)
    return members


async def _address(intake: Intake, file: BatchFile) -> None:
    if file.staged is not None:
        file.staged = await addressed(intake, file.staged)


async def _give_metadata(files: BatchFiles, file: BatchFile, mapped: MappedMetadata, common: Mapping[str, Any]) -> None:
    if file.staged is None:
        return
    try:
        metadata = mapped.by_filename[file.arrival.filename]
        if isinstance(metadata, PipelineError):
            raise metadata
        file.arrival = replace(file.arrival, metadata=check_metadata({**common, **metadata}))
    except PipelineError as error:
        await files.refuse(file, error)


async def _confirm(files: BatchFiles, members: Sequence[BatchMember], unlike: Mapping[str, StagedFile]) -> None:
    """Sees that each document has its object, and that no other object stays."""
    taken = set()
    for file, member in zip(files.files, members, strict=True):
        if file.staged is None:
            continue
        if member.error_code is None:
            taken.add(file.staged.sha256)
        if unlike[file.staged.sha256] is not file.staged:
            try:
                await discard(files.intake, file.staged)
            except PipelineError as error:  # the batch is made
                log.warning("object_left_for_maintenance", key=file.staged.incoming, error=str(error))
    await _together(
        (confirm_placed if digest in taken else withdraw)(files.intake, staged) for digest, staged in unlike.items()
    )


def _log(batch_id: UUID, members: Sequence[BatchMember]) -> None:
    for member in members:
        log.info(
            "batch_document",
            batch_id=batch_id,
            filename=member.filename,
            document_id=member.document_id,
            job_id=member.job_id,
            duplicate=member.duplicate,
            code=member.error_code,
        )
    refused = sum(member.error_code is not None for member in members)
    log.info("batch_accepted", batch_id=batch_id, files=len(members), refused=refused)


def _same_names(files: Sequence[BatchFile]) -> list[str]:
    counted = Counter(file.arrival.filename for file in files)
    return [
        f'{count} files are named "{name}": each is taken for itself, and a row of the mapping holds for all of them'
        for name, count in counted.items()
        if count > 1
    ]


def _row(file: BatchFile) -> StoredFile | RefusedFile:
    staged = file.staged
    if staged is None:
        error = file.refusal or PipelineError(ErrorCode.INTERNAL, "The file was not staged.")
        return RefusedFile(file.arrival.filename, error.code.value, error.message)
    return StoredFile(
        filename=file.arrival.filename,
        document_id=staged.document_id,
        media_type=staged.media_type,
        file_bytes=staged.size,
        file_sha256=staged.sha256,
        raw_key=staged.raw_key,
        metadata=file.arrival.metadata,
    )


async def _together(work: Iterable[Awaitable[None]]) -> None:
    """Does things a few at once; the first failure comes out when all have ended."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def in_turn(one: Awaitable[None]) -> None:
        async with turns:
            await one

    for outcome in await asyncio.gather(*(in_turn(one) for one in work), return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
