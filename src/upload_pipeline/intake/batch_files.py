"""The files of a batch while they come: each stored, measured and opened, or refused with a reason.

A file that fails its checks is a failed member of its batch. Whatever else fails, the sender, the store, the scanner,
fails the batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.arrival import Arrival, check_arrival
from upload_pipeline.intake.staging import Intake, StagedFile, Terms, discard, open_staged, stage_path, stage_stream

MAX_FILES = 100
"""Files of one batch."""

AT_ONCE = 4
"""Files that are opened, or moved, at once."""

FILE_FAULTS = frozenset(
    {
        ErrorCode.EMPTY_FILE,
        ErrorCode.FILE_TOO_LARGE,
        ErrorCode.FILE_NOT_FOUND,
        ErrorCode.FILE_UNREADABLE,
        ErrorCode.FILE_CHANGED,
        ErrorCode.UNSUPPORTED_TYPE,
        ErrorCode.TYPE_MISMATCH,
        ErrorCode.ENCRYPTED,
        ErrorCode.CORRUPT_FILE,
        ErrorCode.MALWARE_FOUND,
        ErrorCode.INVALID_METADATA,
        ErrorCode.PARSE_FAILED,
        ErrorCode.PARSE_EMPTY,
        ErrorCode.PARSE_TIMEOUT,
        ErrorCode.PARSE_MEMORY,
        ErrorCode.PARSE_CRASHED,
    }
)
"""What fails a file and not its batch."""


@dataclass(slots=True)
class BatchFile:
    """A file of a batch: staged, or refused; `opening` sees whether it opens."""

    arrival: Arrival
    staged: StagedFile | None = None
    opening: asyncio.Task[None] | None = None
    refusal: PipelineError | None = None


@dataclass(slots=True)
class BatchFiles:
    """The files that have come so far.

    Attributes:
        intake: database, store, limits.
        user_id: the owner.
        correlation_id: stands on every event and log line that follows.
        stack: holds what is staged; left by an exception, it removes it.
    """

    intake: Intake
    user_id: UUID
    correlation_id: str
    stack: AsyncExitStack
    files: list[BatchFile] = field(default_factory=list)
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    @property
    def received(self) -> int:
        """Files so far, refused ones too."""
        return len(self.files)

    async def add_stream(
        self, filename: str, chunks: AsyncIterator[bytes], *, file_faults: Collection[ErrorCode] = ()
    ) -> None:
        """Takes the next file as it comes; returns when it is stored, and it is opened while the next one comes.

        Args:
            filename: as the sender named it.
            chunks: the bytes; what this raises comes out unchanged. Not read to the end where the file is refused.
            file_faults: codes by which `chunks` itself says that this file is at fault, and not its sender.

        Raises:
            PipelineError: `BATCH_TOO_LARGE` at the file after the last that a batch may have; what fails the batch, of
                this file or one before it.
        """
        file, source = self._next(filename), _Source(chunks)
        staging = stage_stream(
            self.intake, chunks=source.chunks(), arrival=file.arrival, terms=Terms(self.intake.max_bytes)
        )
        try:
            file.staged = await self.stack.enter_async_context(staging)
        except PipelineError as error:
            if source.failure is not None and error.code not in file_faults:
                raise source.failure from None
            await self.refuse(file, error)
            return
        file.opening = asyncio.create_task(self._open(file, file.staged))

    async def add_path(self, path: Path) -> None:
        """Takes a file of this machine; otherwise as `add_stream`."""
        file = self._next(path.name)
        staging = stage_path(self.intake, path=path, arrival=file.arrival, terms=Terms(self.intake.max_bytes))
        try:
            file.staged = await self.stack.enter_async_context(staging)
        except PipelineError as error:
            await self.refuse(file, error)
            return
        file.opening = asyncio.create_task(self._open(file, file.staged))

    async def add_refused(self, filename: str, error: PipelineError) -> None:
        """Counts a file that was not even read.

        Raises:
            PipelineError: `BATCH_TOO_LARGE`.
        """
        await self.refuse(self._next(filename), error)

    async def opened(self) -> int:
        """Waits until every file that has come was opened; how many are good.

        Raises:
            PipelineError: what fails the batch.
        """
        for file in self.files:
            if file.opening is not None:
                await file.opening
        return sum(file.refusal is None for file in self.files)

    async def refuse(self, file: BatchFile, error: PipelineError) -> None:
        """Makes a file a failed member, and lets go of what is stored of it.

        Raises:
            PipelineError: the error itself where it is no fault of the file.
        """
        if file.staged is not None:
            await discard(self.intake, file.staged)
            file.staged = None
        if error.code not in FILE_FAULTS:
            raise error
        file.refusal = error

    async def _open(self, file: BatchFile, staged: StagedFile) -> None:
        async with self._turns:
            try:
                await open_staged(self.intake, staged)
            except PipelineError as error:
                await self.refuse(file, error)

    def _next(self, filename: str) -> BatchFile:
        if len(self.files) == MAX_FILES:
            raise too_many_files(MAX_FILES + 1)
        for file in self.files:
            if file.opening is not None and file.opening.done() and not file.opening.cancelled():
                file.opening.result()  # what fails the batch fails it now, not after the last file
        file = BatchFile(check_arrival(filename, self.user_id, {}, self.correlation_id, 0))
        self.files.append(file)
        return file

    async def stop_opening(self) -> None:
        """Ends what is still being opened; part of leaving the batch."""
        opening = [file.opening for file in self.files if file.opening is not None]
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)


def too_many_files(count: int, *, at_least: bool = False) -> PipelineError:
    """The error of a batch with too many files."""
    counted = f"at least {count}" if at_least else str(count)
    return PipelineError(
        ErrorCode.BATCH_TOO_LARGE,
        f"The batch has {counted} files, and at most {MAX_FILES} are taken. Send them as several batches.",
        {"files": count, "max_files": MAX_FILES},
    )


class _Source:
    """A stream that remembers how it failed: a failing sender is no fault of the file."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.failure: Exception | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        try:
            async for chunk in self._chunks:
                yield chunk
        except Exception as error:
            self.failure = error
            raise
        finally:
            close = getattr(self._chunks, "aclose", None)
            if close is not None:
                await close()
