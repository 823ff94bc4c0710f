"""Organisations, projects and photos as the tests make them."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from sessions import Connection
from verbs import value

PHOTO_STAGES = ("pending_upload", "uploaded", "extracting", "extracted", "detecting", "completed")


def add_organization(db: Connection, owner: UUID) -> UUID:
    """An organisation with one member."""
    organization: UUID = value(db, "select upload_pipeline.add_organization(%s)", f"of {owner} {uuid4()}")
    db.execute("select upload_pipeline.set_member(%s, %s, 'owner')", [organization, owner])
    return organization


def add_project(db: Connection, owner: UUID, organization: UUID | None = None) -> UUID:
    """A project of an organisation, or of a new one of this owner."""
    project: UUID = value(
        db,
        "select upload_pipeline.add_project(%s, %s)",
        organization or add_organization(db, owner),
        f"project {uuid4()}",
    )
    return project


def reserve_photo(
    db: Connection,
    user: UUID,
    project: UUID,
    photo: UUID | None = None,
    window: str = "15 minutes",
    priority: str = "normal",
) -> Any:
    """The one row that `reserve_photo` answers."""
    photo = photo or uuid4()
    return db.execute(
        """
        select * from upload_pipeline.reserve_photo(
          %s, %s, %s, 'roof.jpg', 'image/jpeg', 2048, %s, %s, '{damage}', %s, 'request-1')
        """,
        [photo, user, project, f"{project}/2031/05/17/{photo}.jpg", window, priority],
    ).fetchone()


def announce_photo(db: Connection, photo: UUID, status: str = "uploaded") -> str:
    """The status that `announce_photo` answers."""
    return str(value(db, "select upload_pipeline.announce_photo(%s, %s)", photo, status))


def photo_row(db: Connection, photo: UUID) -> Any:
    """The photo as it stands."""
    return db.execute("select * from upload_pipeline.photos where photo_id = %s", [photo]).fetchone()


def history(db: Connection, job: UUID) -> list[str]:
    """The statuses of a photo that the events of its job tell, oldest first."""
    rows = db.execute(
        """
        select payload ->> 'status' as status from upload_pipeline.events
         where job_id = %s and code = 'photo_status_changed' order by event_id
        """,
        [job],
    ).fetchall()
    return [row.status for row in rows]
