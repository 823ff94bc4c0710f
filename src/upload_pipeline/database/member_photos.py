"""Photos and projects as the members of their organisation ask for them.

All run on a connection that `as_user` has made the member's, so row-level security decides what there is, and a photo
whose deletion has begun is not there; the one that does not says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class StatusChange:
    """What a photo's status became, and when."""

    status: str
    at: datetime


@dataclass(frozen=True, slots=True)
class MemberPhoto:
    """A photo as a member of its organisation sees it.

    Attributes:
        role: the member's.
        user_id: who has uploaded it.
        job_id: its job; the uploader's to ask after.
        width: in pixels, as displayed; None before it was looked at.
        height: the same.
        shared_key: of the copy that is handed out in the original's place; None where the original is.
        exif: what its EXIF says; empty where it says nothing.
        detections: None where nothing was looked for, or not yet.
        error: `code`, `message` and `details` where it has failed; None otherwise.
        uploaded_at: when its bytes were seen first.
        history: oldest first.
    """

    photo_id: UUID
    project_id: UUID
    user_id: UUID
    role: str
    job_id: UUID | None
    file_name: str
    file_bytes: int
    media_type: str
    raw_key: str
    shared_key: str | None
    detection_types: tuple[str, ...]
    priority: str
    status: str
    width: int | None
    height: int | None
    exif: dict[str, Any]
    warnings: tuple[str, ...]
    thumbnail_key: str | None
    detections: Any
    detector: str | None
    error: dict[str, Any] | None
    uploaded_at: datetime | None
    created_at: datetime
    history: tuple[StatusChange, ...]


# A member asks within their own organisations only, so there is always a role.
_COLUMNS = """
       p.photo_id, p.project_id, p.user_id,
       (select m.role from upload_pipeline.organization_members m
         where m.organization_id = p.organization_id and m.user_id = (select auth.uid())) as role,
       g.job_id, p.file_name, p.file_bytes, p.media_type, p.raw_key, p.shared_key, p.detection_types, p.priority,
       p.status, p.width, p.height, p.exif, p.warnings, p.thumbnail_key, p.detections, p.detector, g.error_code,
       g.error_message, g.error_details, p.uploaded_at, p.created_at, g.statuses, g.times
"""

_ONE = f"""
select {_COLUMNS}
  from upload_pipeline.photos p
  left join upload_pipeline.photo_progress(array[$1::uuid]) g on g.photo_id = p.photo_id
 where p.photo_id = $1
"""  # noqa: S608 - the columns are a constant

# One walk of the index for each project asked for, of a page at most.
_PAGE = """
with page as materialized (
  select q.*
    from (select j.project_id from upload_pipeline.projects j where $1::uuid is null or j.project_id = $1) j
   cross join lateral (
     select f.* from upload_pipeline.photos f
      where f.project_id = j.project_id{status}
        and f.created_at <= case when $3::timestamptz is null then 'infinity' else $3 end
        and ($3::timestamptz is null or f.created_at < $3 or f.photo_id > $4)
      order by f.created_at desc, f.photo_id limit $2) q
   order by q.created_at desc, q.photo_id limit $2)
select {columns}
  from page p
  left join upload_pipeline.photo_progress(array(select s.photo_id from page s)) g on g.photo_id = p.photo_id
 order by p.created_at desc, p.photo_id
"""

_ALL = _PAGE.format(status="", columns=_COLUMNS)
_OF_STATUS = _PAGE.format(status=" and f.status = $5", columns=_COLUMNS)


async def find_photo(connection: Executor, photo_id: UUID) -> MemberPhoto | None:
    """A photo of the member's organisations, or None."""
    row = await connection.fetchrow(_ONE, photo_id)
    return _photo(row) if row else None


async def list_photos(
    connection: Executor,
    *,
    project_id: UUID | None,
    status: str | None,
    limit: int,
    before: tuple[datetime, UUID] | None,
) -> list[MemberPhoto]:
    """Photos of the member's organisations, newest first.

    Args:
        connection: the member's.
        project_id: only photos of this project.
        status: only photos of this status.
        limit: at most so many.
        before: creation time and id of the last photo of the page before.
    """
    rows = await connection.fetch(
        _ALL if status is None else _OF_STATUS,
        project_id,
        limit,
        *(before or (None, None)),
        *(() if status is None else (status,)),
    )
    return [_photo(row) for row in rows]


async def has_project(connection: Executor, project_id: UUID) -> bool:
    """Whether the member's organisations have this project."""
    return bool(
        await connection.fetchval(
            "select exists (select from upload_pipeline.projects where project_id = $1)", project_id
        )
    )


async def is_being_deleted(db: Executor, photo_id: UUID, user_id: UUID) -> bool:
    """Whether a photo that the user could delete is gone for everybody and not yet for the database.

    The one query here that runs as `upload_worker`: row-level security hides such a photo.
    """
    return bool(
        await db.fetchval(
            """
            select exists (
              select from upload_pipeline.photos p
                join upload_pipeline.organization_members m
                  on m.organization_id = p.organization_id and m.user_id = $2
               where p.photo_id = $1 and p.deleted_at is not null
                 and (m.role in ('owner', 'admin') or (m.role = 'member' and p.user_id = $2)))
            """,
            photo_id,
            user_id,
        )
    )


def _photo(row: Any) -> MemberPhoto:
    fields = dict(row)
    code, message = fields.pop("error_code"), fields.pop("error_message")
    details = fields.pop("error_details")
    error = None
    if code is not None:
        error = {"code": code, "message": message, "details": json.loads(details) if details else {}}
    statuses, times = fields.pop("statuses") or [], fields.pop("times") or []
    detections = fields.pop("detections")
    return MemberPhoto(
        **{
            **fields,
            "exif": json.loads(fields["exif"]),
            "warnings": tuple(fields["warnings"]),
            "detection_types": tuple(fields["detection_types"]),
        },
        detections=json.loads(detections) if detections is not None else None,
        error=error,
        history=tuple(StatusChange(status, at) for status, at in zip(statuses, times, strict=True)),
    )
