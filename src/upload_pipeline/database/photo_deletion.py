"""Deleting photos: rows and objects, in an order that a crash at any point leaves able to finish; as `deletion`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from uuid import UUID

from upload_pipeline.database import photos
from upload_pipeline.database.deletion import end_deletions
from upload_pipeline.database.photos import DeletedPhoto
from upload_pipeline.database.queue import Executor

RemovePhotoObjects = Callable[[DeletedPhoto], Awaitable[None]]
"""Removes every object of a photo; missing ones are fine."""

EXPIRY_ROUNDS = 20
"""A round of maintenance is a minute; a user announces a hundred photos in one."""


async def delete_photo(
    db: Executor, photo_id: UUID, remove_objects: RemovePhotoObjects, *, correlation_id: str = ""
) -> bool:
    """Deletes a photo with its objects and its job, which is fenced off first. Safe to repeat.

    Args:
        db: as role `upload_worker`.
        photo_id: of the photo.
        remove_objects: removes what the store has of it.
        correlation_id: of the request, for the events.

    Returns:
        False where there is no such photo.

    Raises:
        PipelineError: as `remove_objects` does; then the photo is hidden, and maintenance goes on with it.
    """
    deleted = await photos.begin_deletion(db, photo_id, correlation_id=correlation_id)
    if deleted is None:
        return False
    await remove_objects(deleted)
    await photos.finish_deletion(db, photo_id, correlation_id=correlation_id)
    return True


async def finish_photo_deletions(db: Executor, *, before: datetime, remove_objects: RemovePhotoObjects) -> int:
    """Ends deletions that were begun before a moment and not finished; returns how many.

    Raises:
        PipelineError: as `remove_objects` does, the first one, after all others were tried.
    """
    return await _end(db, await photos.unfinished_deletions(db, before=before), remove_objects)


async def expire_photos(db: Executor, *, grace: timedelta, remove_objects: RemovePhotoObjects) -> int:
    """Deletes photos that had not come `grace` after their deadline, at most `EXPIRY_ROUNDS` times 100; how many.

    Raises:
        PipelineError: as `finish_photo_deletions`; what was begun is ended by it.
    """
    expired = 0
    for _ in range(EXPIRY_ROUNDS):
        begun = await photos.begin_expiry(db, grace=grace)
        expired += await _end(db, begun, remove_objects)
        if not begun:
            break
    return expired


async def _end(db: Executor, begun: list[DeletedPhoto], remove_objects: RemovePhotoObjects) -> int:
    return await end_deletions(begun, remove_objects, lambda each: photos.finish_deletion(db, each.photo_id))
