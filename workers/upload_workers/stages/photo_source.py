"""What the steps of photos share: the photo's row, a local copy of an object, and storing one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

from upload_pipeline.database.photos import Photo, has_photo, load_photo
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.photo_reading import PhotoReader
from upload_pipeline.storage.objects import StoredObject
from upload_workers.steps import StepContext

log = structlog.get_logger(__name__)


async def photo_of(job: ClaimedJob, context: StepContext) -> Photo:
    """The job's photo.

    Raises:
        PipelineError: `PHOTO_NOT_FOUND`, where it was deleted meanwhile.
    """
    photo = await load_photo(context.db, job.photo_id)
    if photo is None:
        message = f"Photo {job.photo_id} does not exist any more: it was deleted while its job was at work."
        raise PipelineError(ErrorCode.PHOTO_NOT_FOUND, message)
    return photo


def reader_of(context: StepContext) -> PhotoReader:
    """What reads photos in this process."""
    if context.photos is None:
        raise PipelineError(ErrorCode.INTERNAL, "This worker has no reader of photos.")
    return context.photos


@asynccontextmanager
async def local_object(key: str, context: StepContext) -> AsyncGenerator[tuple[Path, StoredObject]]:
    """An object as a local file, in a folder that goes with it.

    Raises:
        PipelineError: `OBJECT_MISSING`, and as the store does.
    """
    with TemporaryDirectory(dir=context.scratch, prefix="job-") as directory:
        path = Path(directory) / "photo"
        yield path, await context.store.download(key, path)


async def store_beside(photo: Photo, key: str, writing: Awaitable[object], context: StepContext) -> None:
    """Stores an object of the photo, and takes it out again where the photo was deleted meanwhile.

    A deletion hides the photo and then removes the objects that it has. One that comes after that would stay, so
    whoever stores one looks at the photo again.

    Args:
        key: of the object.
        writing: stores it.

    Raises:
        PipelineError: as the store does.
    """
    try:
        await writing
    finally:
        # Also where the task is cancelled: that is how a worker learns that its job was ended.
        await asyncio.shield(asyncio.create_task(_take_out_of_deleted(photo, key, context)))


async def _take_out_of_deleted(photo: Photo, key: str, context: StepContext) -> None:
    try:
        # A photo's id is drawn and never comes again, so neither does an object's key.
        if not await has_photo(context.db, photo.photo_id):
            await context.store.delete([key])
    except Exception as error:  # noqa: BLE001 - the step goes on or fails by itself; maintenance sweeps
        log.warning("object_left_for_maintenance", key=key, error=str(error) or type(error).__name__)
