"""A file on its way in: measured, typed by its content, opened, and held where nothing names it yet.

A stream goes to `incoming/…` at once, since it cannot be read twice. A file of this machine is measured and opened
where it lies, and goes there only when nothing has spoken against it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import structlog

from upload_pipeline import ids
from upload_pipeline.database.queue import Executor
from upload_pipeline.database.uploads import Upload
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.arrival import Arrival
from upload_pipeline.intake.local_file import changed, measure, read_blocks, too_large
from upload_pipeline.media_types import HEAD_BYTES, detect_media_type, spoken_types
from upload_pipeline.storage.free_space import require_free
from upload_pipeline.storage.keys import incoming_key, raw_key
from upload_pipeline.storage.objects import StoredObject
from upload_pipeline.storage.store import ObjectStore
from upload_pipeline.storage.virus_scan import VirusScanner

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Intake:
    """What taking files in needs.

    Attributes:
        db: as role `upload_worker`.
        store: where the bytes go.
        inspect: opens a local file of a media type to see that it can be read; raises `PipelineError` (`ENCRYPTED`,
            `CORRUPT_FILE`, …) where it cannot.
        max_bytes: largest file that is taken where no `Terms` say otherwise.
        scratch: directory for local copies; made where it is missing.
        retry_seconds: how long a database that is away is waited for once the bytes are in place.
        min_free_bytes: bytes that must stay free on the disks of the store and of `scratch`.
        scanner: sees all bytes on their way; None where there is none.
    """

    db: Executor
    store: ObjectStore
    inspect: Callable[[Path, str], Awaitable[None]]
    max_bytes: int
    scratch: Path
    retry_seconds: float = 5.0
    min_free_bytes: int = 0
    scanner: VirusScanner | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What one kind of upload takes.

    Attributes:
        max_bytes: largest file, in bytes.
        media_types: which types; None: every one that the pipeline knows.
        extensions: what a name must end in, in lower case with the dot; None: whatever the type allows.
    """

    max_bytes: int
    media_types: frozenset[str] | None = None
    extensions: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file whose bytes are known and belong to no document yet.

    Attributes:
        arrival: what came with it.
        media_type: by its content.
        size: in bytes.
        sha256: 64 lower-case hexadecimal digits.
        incoming: key that the bytes have in the store before they have their own.
        local: path of the same bytes; of a stream it exists once `open_staged` has returned.
        streamed: whether the bytes came as a stream, and so are at `incoming` from the beginning.
        known: the document that the bytes are, or that awaits them, where there is one; its id and key need not follow
            from the user's, since a document may have changed hands.
    """

    arrival: Arrival
    media_type: str
    size: int
    sha256: str
    incoming: str
    local: Path
    streamed: bool
    known: Upload | None = None

    @property
    def document_id(self) -> UUID:
        """The id of the document that these bytes are, or will be."""
        return self.known.document_id if self.known else ids.document_id(self.arrival.user_id, self.sha256)

    @property
    def raw_key(self) -> str:
        """Where the document's bytes lie."""
        return self.known.raw_key if self.known else raw_key(self.arrival.user_id, self.document_id)


@asynccontextmanager
async def stage_stream(
    intake: Intake, *, chunks: AsyncIterator[bytes], arrival: Arrival, terms: Terms
) -> AsyncGenerator[StagedFile, None]:
    """Stores a stream under `incoming/…` and measures it on the way; memory does not grow with it.

    Left by an exception, the object is removed. Left otherwise it is the caller's: `place` it or `discard` it. The
    local copy goes in either case.

    Raises:
        PipelineError: `EMPTY_FILE`, `UNSUPPORTED_TYPE`, `TYPE_MISMATCH`, `ENCRYPTED`; and as `store_chunks` does.
            What `chunks` raises comes out unchanged.
    """
    _require_extension(arrival.filename, terms)
    incoming = incoming_key(uuid4())
    async with removed_on_failure(intake.store, incoming):
        stored = await store_chunks(intake, incoming, chunks, filename=arrival.filename, max_bytes=terms.max_bytes)
        media_type = _typed(arrival.filename, stored.head, stored.size, terms)
        with scratch_directory(intake) as directory:
            yield StagedFile(arrival, media_type, stored.size, stored.sha256, incoming, directory / "file", True)


@asynccontextmanager
async def stage_path(intake: Intake, *, path: Path, arrival: Arrival, terms: Terms) -> AsyncGenerator[StagedFile, None]:
    """Measures a file of this machine; otherwise as `stage_stream`. Nothing is stored before `open_staged`.

    Raises:
        PipelineError: `FILE_NOT_FOUND`, `FILE_UNREADABLE`, and as `stage_stream` does.
    """
    _require_extension(arrival.filename, terms)
    measured = await measure(path, max_bytes=terms.max_bytes)
    media_type = _typed(arrival.filename, measured.head, measured.size, terms)
    incoming = incoming_key(uuid4())
    async with removed_on_failure(intake.store, incoming):
        yield StagedFile(arrival, media_type, measured.size, measured.sha256, incoming, path, False)


async def open_staged(intake: Intake, staged: StagedFile) -> None:
    """Sees that the file can be opened. After it the bytes are both at `incoming` and at `local`.

    Raises:
        PipelineError: what `intake.inspect` raises; `INSUFFICIENT_STORAGE`; `FILE_CHANGED` where a local file was
            written to; and as the store does.
    """
    if staged.streamed:
        # The local copy is the second one of the same bytes, on what is often the same disk.
        await asyncio.to_thread(require_free, staged.local.parent, floor=intake.min_free_bytes, expected=staged.size)
        await intake.store.download(staged.incoming, staged.local)
        await intake.inspect(staged.local, staged.media_type)
    else:
        await intake.inspect(staged.local, staged.media_type)
        await store_local(intake, staged, staged.incoming)


async def store_local(intake: Intake, staged: StagedFile, key: str) -> None:
    """Stores the local copy under a key.

    Raises:
        PipelineError: `FILE_CHANGED` where it is no longer what was measured; and as the store does.
    """
    try:
        stored = await store_chunks(
            intake,
            key,
            read_blocks(staged.local),
            filename=staged.arrival.filename,
            max_bytes=staged.size,
            expected=staged.size,
        )
    except PipelineError as error:
        if error.code is ErrorCode.FILE_TOO_LARGE:  # it has grown
            raise changed(staged.local) from error
        raise
    if stored.sha256 != staged.sha256:
        raise changed(staged.local)


async def store_chunks(
    intake: Intake, key: str, chunks: AsyncIterator[bytes], *, filename: str, max_bytes: int, expected: int = 0
) -> StoredObject:
    """The way by which all bytes of an intake reach the store: whoever wants to see them on the way stands here.

    Args:
        intake: where to.
        key: of the object.
        chunks: the bytes; not asked for one where there is no room.
        filename: for messages.
        max_bytes: the limit.
        expected: how many bytes are to come, as far as that is known.

    Raises:
        PipelineError: `FILE_TOO_LARGE` naming the file and the limit; `INSUFFICIENT_STORAGE` where fewer bytes than
            `intake.min_free_bytes` would stay free, or the disk fills on the way; `MALWARE_FOUND` and
            `SCANNER_UNAVAILABLE`, when the object is there and the caller's to remove; and as the store does.
    """
    await intake.store.require_room(floor=intake.min_free_bytes, expected=expected)
    try:
        if intake.scanner is None:
            return await intake.store.put_stream(key, chunks, max_bytes=max_bytes, head_bytes=HEAD_BYTES)
        async with intake.scanner.scan(filename) as scan:
            passing = scan.passing(chunks)
            stored = await intake.store.put_stream(key, passing, max_bytes=max_bytes, head_bytes=HEAD_BYTES)
            # Not within the writing, which has a bound of its own between two blocks: a verdict may take longer.
            await scan.verdict()
            return stored
    except PipelineError as error:
        if error.code is ErrorCode.FILE_TOO_LARGE:
            raise too_large(filename, max_bytes) from error
        if error.code is ErrorCode.MALWARE_FOUND:
            log.warning("malware_found", filename=filename, signature=error.details["signature"])
        raise


async def discard(intake: Intake, staged: StagedFile) -> None:
    """Removes what was staged of a file that is not to be placed; safe to repeat."""
    await intake.store.delete([staged.incoming])


@asynccontextmanager
async def removed_on_failure(store: ObjectStore, key: str) -> AsyncIterator[None]:
    """Removes an object where what is done meanwhile fails or is cancelled."""
    try:
        yield
    except BaseException:
        await finish(_remove(store, key))
        raise


async def finish(cleanup: Coroutine[Any, Any, None]) -> None:
    """Lets a clean-up end though the task that asked for it is cancelled once more."""
    await asyncio.shield(asyncio.create_task(cleanup))


async def _remove(store: ObjectStore, key: str) -> None:
    try:
        await store.delete([key])
    except PipelineError as error:
        log.warning("object_left_for_maintenance", key=key, error=str(error))


def _require_extension(filename: str, terms: Terms) -> None:
    if terms.extensions is not None and not filename.lower().endswith(tuple(terms.extensions)):
        taken = sorted(terms.extensions)
        raise PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"The name of {filename!r} does not end in {' or '.join(taken)}. Send a file of that type, and name it so.",
            {"filename": filename, "taken": taken},
        )


def _typed(filename: str, head: bytes, size: int, terms: Terms) -> str:
    media_type = detect_media_type(filename, head, size=size)
    require_taken(filename, media_type, terms)
    return media_type


def require_taken(filename: str, media_type: str, terms: Terms) -> None:
    """Refuses a file of a type that the terms do not have.

    Raises:
        PipelineError: `UNSUPPORTED_TYPE`, naming what is taken.
    """
    if terms.media_types is not None and media_type not in terms.media_types:
        raise PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"{filename!r} is {spoken_types({media_type})}, which is not taken here. "
            f"Send {spoken_types(terms.media_types)}.",
            {"filename": filename, "media_type": media_type, "taken": sorted(terms.media_types)},
        )


@contextmanager
def scratch_directory(intake: Intake) -> Iterator[Path]:
    """A directory for local copies, removed when left."""
    intake.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Maintenance clears what begins with job- once it is old: a killed process leaves its copy.
    with TemporaryDirectory(dir=intake.scratch, prefix="job-intake-") as directory:
        yield Path(directory)
