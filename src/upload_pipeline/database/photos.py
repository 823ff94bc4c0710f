"""Photos: the verbs that announce, move and delete them, and what the steps read of one.

One function for each SQL function of `sql/schema/05_photo.sql`, which tells what they do. What members of the
photo's organisation read stands in `member_photos`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upload_pipeline.database.documents import AwaitedBytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class Photo:
    """What the steps read of a photo.

    Attributes:
        user_id: who has uploaded it.
        media_type: `image/jpeg` or `image/png`, as it was announced.
        file_bytes: as it was announced.
        detection_types: what is to be looked for.
        priority: `low`, `normal` or `high`.
        drop_gps: whether its project wants it without the place where it was taken.
        width: in pixels, as displayed; None before it was looked at.
        height: the same.
        thumbnail_key: None before there is one.
        shared_key: of the copy that is handed out in the original's place; None where the original is.
        awaited: None once its bytes were checked.
    """

    photo_id: UUID
    project_id: UUID
    organization_id: UUID
    user_id: UUID
    file_name: str
    file_bytes: int
    media_type: str
    raw_key: str
    detection_types: tuple[str, ...]
    priority: str
    drop_gps: bool
    width: int | None
    height: int | None
    thumbnail_key: str | None
    shared_key: str | None
    awaited: AwaitedBytes | None = None


@dataclass(frozen=True, slots=True)
class ReservedPhoto:
    """A photo whose bytes may come until the deadline, and the job that waits for them."""

    photo_id: UUID
    job_id: UUID
    deadline: datetime


@dataclass(frozen=True, slots=True)
class DeletedPhoto:
    """A photo whose deletion has begun; its objects are still there."""

    photo_id: UUID
    raw_key: str


async def load_photo(db: Executor, photo_id: UUID) -> Photo | None:
    """A photo's row as the steps read it, or None; also of one that is being deleted."""
    row = await db.fetchrow(
        """
        select p.photo_id, p.project_id, p.organization_id, p.user_id, p.file_name, p.file_bytes, p.media_type,
               p.raw_key, p.detection_types, p.priority, j.drop_gps, p.width, p.height, p.thumbnail_key,
               p.shared_key, p.created_at as since, p.upload_deadline as deadline,
               upload_pipeline.now() - p.created_at as waited, p.upload_deadline - upload_pipeline.now() as left
          from upload_pipeline.photos p
          join upload_pipeline.projects j on j.project_id = p.project_id
         where p.photo_id = $1
        """,
        photo_id,
    )
    if row is None:
        return None
    fields = dict(row)
    wait = AwaitedBytes(**{name: fields.pop(name) for name in ("since", "deadline", "waited", "left")})
    return Photo(
        **{**fields, "detection_types": tuple(fields["detection_types"])},
        awaited=wait if wait.deadline is not None else None,
    )


async def existing_photos(db: Executor, photo_ids: Sequence[UUID]) -> set[UUID]:
    """Those of the ids that are photos."""
    rows = await db.fetch("select photo_id from upload_pipeline.photos where photo_id = any($1)", list(photo_ids))
    return {row["photo_id"] for row in rows}


async def has_photo(db: Executor, photo_id: UUID) -> bool:
    """Whether there is a photo that is not being deleted."""
    return bool(
        await db.fetchval(
            "select exists (select from upload_pipeline.photos where photo_id = $1 and deleted_at is null)", photo_id
        )
    )


async def reserve_photo(
    db: Executor,
    *,
    photo_id: UUID,
    user_id: UUID,
    project_id: UUID,
    file_name: str,
    media_type: str,
    file_bytes: int,
    raw_key: str,
    window: timedelta,
    detection_types: Sequence[str] = (),
    priority: str = "normal",
    correlation_id: str = "",
) -> ReservedPhoto:
    """Announces a photo whose bytes are going to come within `window`: makes photo and job.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 where the user's organisations have no such project, UP006 where the
            user's role may not upload.
    """
    row = await db.fetchrow(
        "select * from upload_pipeline.reserve_photo($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        photo_id,
        user_id,
        project_id,
        file_name,
        media_type,
        file_bytes,
        raw_key,
        window,
        list(detection_types),
        priority,
        correlation_id,
    )
    return ReservedPhoto(row["photo_id"], row["job_id"], row["upload_deadline"])


async def announce_photo(db: Executor, photo_id: UUID, status: str) -> str:
    """Says what a photo's status is now, and gives back the one that it has then.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 where there is no such photo, UP003 where it cannot come to that status.
    """
    return str(await db.fetchval("select upload_pipeline.announce_photo($1, $2)", photo_id, status))


async def begin_deletion(db: Executor, photo_id: UUID, *, correlation_id: str = "") -> DeletedPhoto | None:
    """Hides a photo and ends its job; None where there is no such photo. Safe to repeat."""
    row = await db.fetchrow("select * from upload_pipeline.begin_photo_deletion($1, $2)", photo_id, correlation_id)
    return DeletedPhoto(**row) if row else None


async def finish_deletion(db: Executor, photo_id: UUID, *, correlation_id: str = "") -> bool:
    """Removes the rows of a photo whose deletion has begun; False where there are none. Safe to repeat."""
    return bool(await db.fetchval("select upload_pipeline.finish_photo_deletion($1, $2)", photo_id, correlation_id))


async def unfinished_deletions(db: Executor, *, before: datetime) -> list[DeletedPhoto]:
    """Deletions that were begun before a moment and not finished."""
    rows = await db.fetch("select * from upload_pipeline.unfinished_photo_deletions($1)", before)
    return [DeletedPhoto(**row) for row in rows]


async def begin_expiry(db: Executor, *, grace: timedelta) -> list[DeletedPhoto]:
    """Begins the deletion of photos that had not come `grace` after the deadline, of 100 at most."""
    rows = await db.fetch("select * from upload_pipeline.begin_photo_expiry($1)", grace)
    return [DeletedPhoto(**row) for row in rows]
