"""Photos whose job stands at `detecting`, put there without the steps before, for tests of detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from upload_pipeline.storage.photo_keys import photo_key, thumbnail_key

if TYPE_CHECKING:
    import asyncpg

    from upload_pipeline.storage.store import ObjectStore


@dataclass(frozen=True)
class WaitingPhoto:
    """A photo, its job, and the thumbnail that a model is shown."""

    photo_id: UUID
    job_id: UUID
    thumbnail: bytes


async def add_project(admin: asyncpg.Connection, user: UUID) -> UUID:
    """A project of an organisation of the user's own."""
    organization = await admin.fetchval("select upload_pipeline.add_organization($1)", f"of {user} {uuid4()}")
    await admin.execute("select upload_pipeline.set_member($1, $2, 'owner')", organization, user)
    project: UUID = await admin.fetchval("select upload_pipeline.add_project($1, 'roofs')", organization)
    return project


async def add_waiting_photo(
    admin: asyncpg.Connection,
    project: UUID,
    user: UUID,
    *,
    store: ObjectStore | None = None,
    types: Sequence[str] = ("damage",),
    priority: str = "normal",
    stage: str = "detecting",
) -> WaitingPhoto:
    """A photo of a user that waits at a stage; with a store, its thumbnail is there."""
    photo = uuid4()
    key = photo_key(project, datetime.now(UTC).date(), photo, "image/jpeg")
    thumbnail = b"\xff\xd8\xff\xe0 a thumbnail " + photo.bytes
    if store is not None:
        await store.put_bytes(thumbnail_key(key), thumbnail)
    # at once, since a worker may be running that would take the job as it comes
    async with admin.transaction():
        made: Any = await admin.fetchrow(
            """
            select * from upload_pipeline.reserve_photo(
              $1, $2, $3, 'roof.jpg', 'image/jpeg', 2048, $4, interval '15 minutes', $5, $6, 'request-1')
            """,
            photo,
            user,
            project,
            key,
            list(types),
            priority,
        )
        await admin.execute(
            "update upload_pipeline.photos set thumbnail_key = $2 where photo_id = $1", photo, thumbnail_key(key)
        )
        await admin.execute(
            "update upload_pipeline.upload_jobs set stage = $2 where job_id = $1", made["job_id"], stage
        )
    return WaitingPhoto(photo, made["job_id"], thumbnail)


async def photo_of(admin: asyncpg.Connection, photo_id: UUID) -> Any:
    """The photo as it stands, its job's state and its error with it."""
    return await admin.fetchrow(
        """
        select p.*, j.state::text as state, j.stage, j.retry_count, j.run_at - now() as left, o.error_code,
               o.error_message, o.results
          from upload_pipeline.photos p
          join upload_pipeline.upload_jobs j on j.photo_id = p.photo_id
          left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
         where p.photo_id = $1
        """,
        photo_id,
    )
