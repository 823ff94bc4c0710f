"""Photos: announced by what is said of them, taken from their sender, and said to be there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar
from uuid import UUID, uuid4

import asyncpg
import structlog

from upload_pipeline.database import photos, queue
from upload_pipeline.database.photos import Photo, ReservedPhoto
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.arrival import invalid_argument
from upload_pipeline.intake.filenames import display_name
from upload_pipeline.intake.placing import named, until_answered
from upload_pipeline.intake.staging import Intake, finish, removed_on_failure, store_chunks
from upload_pipeline.stages import PhotoStatus
from upload_pipeline.storage.keys import incoming_key
from upload_pipeline.storage.photo_keys import photo_key

log = structlog.get_logger(__name__)

EXTENSIONS: dict[str, tuple[str, ...]] = {"image/jpeg": (".jpg", ".jpeg"), "image/png": (".png",)}
"""What the name of a photo of each type that is taken may end in."""

STORAGE_RETRY_DELAYS = (1.0, 2.0, 4.0)
"""Seconds before each further try where the store fails while a photo is announced."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PhotoAnnouncement:
    """What is said of a photo before its bytes come.

    Attributes:
        file_name: as `display_name` makes it.
        media_type: `image/jpeg` or `image/png`, and the name agrees.
        file_bytes: the exact size.
        detection_types: what is to be looked for, each once.
        priority: `low`, `normal` or `high`.
    """

    project_id: UUID
    file_name: str
    media_type: str
    file_bytes: int
    detection_types: tuple[str, ...]
    priority: str


@dataclass(frozen=True, slots=True)
class PhotoTerms:
    """Which photos are taken: sizes in bytes, and what may be looked for in them."""

    min_bytes: int
    max_bytes: int
    detection_types: tuple[str, ...]


def check_announcement(
    *,
    project_id: UUID,
    file_name: str,
    media_type: str,
    file_bytes: int,
    detection_types: Sequence[str],
    priority: str,
    terms: PhotoTerms,
) -> PhotoAnnouncement:
    """What is announced, where it may be taken by what is said of it; its bytes are looked at when they have come.

    Raises:
        PipelineError: `UNSUPPORTED_TYPE`, `TYPE_MISMATCH` where name and type do not agree, `FILE_TOO_SMALL`,
            `FILE_TOO_LARGE`, `INVALID_ARGUMENT` for a detection type that there is not.
    """
    name = display_name(file_name)
    kind = media_type.strip().lower()
    if kind not in EXTENSIONS:
        raise PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"{name!r} is announced as {kind[:100]!r}, which is not taken here. Send a JPEG or a PNG.",
            {"media_type": kind[:100], "taken": sorted(EXTENSIONS)},
        )
    if not name.lower().endswith(EXTENSIONS[kind]):
        endings = [ending for endings in EXTENSIONS.values() for ending in endings]
        known = name.lower().endswith(tuple(endings))
        raise PipelineError(
            ErrorCode.TYPE_MISMATCH if known else ErrorCode.UNSUPPORTED_TYPE,
            f"{name!r} is announced as {kind}, whose names end in {' or '.join(EXTENSIONS[kind])}. "
            "Send a JPEG or a PNG under a name and a type that say the same.",
            {"file_name": name, "media_type": kind, "taken": endings},
        )
    if file_bytes < terms.min_bytes:
        raise PipelineError(
            ErrorCode.FILE_TOO_SMALL,
            f"{name!r} is announced with {file_bytes} bytes; {terms.min_bytes} are the least. Send the whole photo.",
            {"file_name": name, "file_bytes": file_bytes, "min_bytes": terms.min_bytes},
        )
    if file_bytes > terms.max_bytes:
        raise PipelineError(
            ErrorCode.FILE_TOO_LARGE,
            f"{name!r} is announced with {file_bytes} bytes; at most {terms.max_bytes} are taken. Send a smaller one.",
            {"file_name": name, "file_bytes": file_bytes, "max_bytes": terms.max_bytes},
        )
    unknown = sorted(set(detection_types) - set(terms.detection_types))
    if unknown:
        raise invalid_argument(
            "detection_types", ", ".join(unknown)[:100], f"of these: {', '.join(terms.detection_types) or 'none'}"
        )
    return PhotoAnnouncement(project_id, name, kind, file_bytes, tuple(dict.fromkeys(detection_types)), priority)


def new_photo_key(announced: PhotoAnnouncement, photo_id: UUID, day: date | None = None) -> str:
    """The key of a photo that is announced today, by UTC."""
    return photo_key(announced.project_id, day or datetime.now(UTC).date(), photo_id, announced.media_type)


async def with_store(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks the store, and three times more where it fails for the moment.

    Raises:
        PipelineError: `STORAGE_UNAVAILABLE` where it still fails; and at once what is no failure of a moment.
    """
    for delay in STORAGE_RETRY_DELAYS:
        try:
            return await ask()
        except PipelineError as error:
            if error.code is not ErrorCode.STORAGE_UNAVAILABLE:
                raise
            log.warning("storage_retried", seconds=delay, error=error.message)
        await asyncio.sleep(delay)
    return await ask()


async def reserve_photo(
    intake: Intake,
    announced: PhotoAnnouncement,
    *,
    photo_id: UUID,
    raw_key: str,
    user_id: UUID,
    window: timedelta,
    correlation_id: str,
) -> ReservedPhoto:
    """Makes the photo with its job, which waits for the bytes.

    Raises:
        PipelineError: `PROJECT_NOT_FOUND` where the user's organisations have no such project; `FORBIDDEN` where the
            user's role may not upload; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    try:
        return await named(
            photos.reserve_photo(
                intake.db,
                photo_id=photo_id,
                user_id=user_id,
                project_id=announced.project_id,
                file_name=announced.file_name,
                media_type=announced.media_type,
                file_bytes=announced.file_bytes,
                raw_key=raw_key,
                window=window,
                detection_types=announced.detection_types,
                priority=announced.priority,
                correlation_id=correlation_id,
            ),
            f"reserve {announced.file_name!r}",
        )
    except asyncpg.PostgresError as error:
        if error.sqlstate == queue.NOT_FOUND:
            raise no_such_project(announced.project_id) from error
        if error.sqlstate == queue.NOT_ALLOWED:
            raise may_not("upload") from error
        raise


async def receive_photo(
    intake: Intake, *, photo_id: UUID, file_bytes: int, raw_key: str, chunks: AsyncIterator[bytes]
) -> None:
    """Takes the announced bytes of a photo as they arrive; memory does not grow with them.

    They are put in place once they are whole, and then the photo's job looks at them. Safe to repeat until it has; a
    failure leaves nothing, and the photo goes on waiting.

    Args:
        intake: database, store.
        photo_id: of `reserve_photo`.
        file_bytes: how many bytes were announced.
        raw_key: where they are to lie.
        chunks: the bytes; what this raises comes out unchanged.

    Raises:
        PipelineError: `PHOTO_NOT_FOUND`, also where it is deleted meanwhile; `INVALID_STATE` where its bytes were
            taken and checked before; `CHECKSUM_MISMATCH` for more bytes, or fewer; `MALWARE_FOUND`,
            `SCANNER_UNAVAILABLE`, `INSUFFICIENT_STORAGE`, `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`,
            `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    photo = await _awaiting(intake, photo_id, raw_key)
    incoming = incoming_key(uuid4())
    async with removed_on_failure(intake.store, incoming):
        await _store_exactly(intake, photo, incoming, file_bytes, chunks)
        # What came by another PUT meanwhile, and was looked at, stays.
        await _awaiting(intake, photo_id, raw_key)
        try:
            await intake.store.move(incoming, raw_key)
            await _announce(intake, photo_id)
        except BaseException:
            await finish(_take_out_of_deleted(intake, photo))
            raise


async def announce_status(intake: Intake, *, photo_id: UUID, status: str) -> PhotoStatus:
    """Says what a photo's status is now; what there is after it. Safe to repeat.

    Raises:
        PipelineError: `PHOTO_NOT_FOUND`; `INVALID_STATE` where it cannot come to that status, naming the one that it
            has; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    try:
        told = await named(photos.announce_photo(intake.db, photo_id, status), f"say that photo {photo_id} is {status}")
    except asyncpg.PostgresError as error:
        if error.sqlstate == queue.NOT_FOUND:
            raise no_such_photo(photo_id) from error
        raise
    return PhotoStatus(told)


def no_such_photo(photo_id: UUID) -> PipelineError:
    """The error for a photo that is not there, is being deleted, or is another organisation's: one and the same."""
    return PipelineError(
        ErrorCode.PHOTO_NOT_FOUND,
        f"There is no photo {photo_id}. `GET /api/v1/photos` lists those that there are.",
        {"photo_id": str(photo_id)},
    )


def no_such_project(project_id: UUID) -> PipelineError:
    """The error for a project that is not there, or is another organisation's: one and the same."""
    return PipelineError(
        ErrorCode.PROJECT_NOT_FOUND,
        f"There is no project {project_id}. Check the id, and that you are in its organisation.",
        {"project_id": str(project_id)},
    )


def may_not(action: str) -> PipelineError:
    """The error for a member whose role does not allow something."""
    return PipelineError(
        ErrorCode.FORBIDDEN, f"Your role in this organisation does not let you {action}. Ask one of its owners."
    )


async def _awaiting(intake: Intake, photo_id: UUID, raw_key: str) -> Photo:
    photo = await named(photos.load_photo(intake.db, photo_id), f"look up photo {photo_id}")
    if photo is None or photo.raw_key != raw_key or not await named(photos.has_photo(intake.db, photo_id), "look up"):
        raise no_such_photo(photo_id)
    if photo.awaited is None:
        raise PipelineError(
            ErrorCode.INVALID_STATE,
            f"The bytes of {photo.file_name!r} are there already and were checked. Announce another photo to send "
            "others.",
            {"photo_id": str(photo_id)},
        )
    return photo


async def _store_exactly(intake: Intake, photo: Photo, key: str, file_bytes: int, chunks: AsyncIterator[bytes]) -> None:
    try:
        stored = await store_chunks(
            intake, key, chunks, filename=photo.file_name, max_bytes=file_bytes, expected=file_bytes
        )
    except PipelineError as error:
        if error.code is ErrorCode.FILE_TOO_LARGE:
            raise _other_length(photo, f"more than the {file_bytes} bytes came") from error
        raise
    if stored.size != file_bytes:
        raise _other_length(photo, f"{stored.size} bytes came instead of {file_bytes}")


async def _announce(intake: Intake, photo_id: UUID) -> None:
    async def say() -> None:
        try:
            await photos.announce_photo(intake.db, photo_id, PhotoStatus.UPLOADED)
        except asyncpg.PostgresError as error:
            if error.sqlstate == queue.NOT_FOUND:
                raise no_such_photo(photo_id) from error
            # One that has failed meanwhile has its bytes for whoever retries it.
            if error.sqlstate != queue.INVALID_STATE:
                raise

    await until_answered(intake, say, f"say that photo {photo_id} is there")


async def _take_out_of_deleted(intake: Intake, photo: Photo) -> None:
    try:
        if not await photos.has_photo(intake.db, photo.photo_id):
            await intake.store.delete([photo.raw_key])
    except Exception as error:  # noqa: BLE001 - the failure that led here is the one to report; maintenance sweeps
        log.warning("object_left_for_maintenance", key=photo.raw_key, error=str(error) or type(error).__name__)


def _other_length(photo: Photo, found: str) -> PipelineError:
    return PipelineError(
        ErrorCode.CHECKSUM_MISMATCH,
        f"What was sent for {photo.file_name!r} is not what was announced: {found}. Send the announced file, or "
        "announce the one that you have.",
        {"file_name": photo.file_name},
    )
