"""Organisations, projects and photos for the tests of the service, made by the verbs that make them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
from PIL import Image

from tests.api.job_rows import TTL, WORKER
from tests.api.live_service import LiveService, new_user
from upload_pipeline.database import queue
from upload_pipeline.database.photos import reserve_photo
from upload_pipeline.database.queue import Advance, ClaimedJob
from upload_pipeline.stages import PHOTO_STAGES
from upload_pipeline.storage.photo_keys import photo_key
from upload_pipeline.storage.store_mark import MARK_KEY

URL = "/api/v1/photos/upload-url"


def _jpeg() -> bytes:
    buffer = BytesIO()
    Image.effect_noise((64, 48), 90).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()
"""A photo of some kilobytes."""


@dataclass(frozen=True)
class Office:
    """An organisation with a member of each role."""

    organization_id: UUID
    project_id: UUID
    owner: UUID
    admin: UUID
    member: UUID
    colleague: UUID
    viewer: UUID


async def add_office(admin: asyncpg.Connection) -> Office:
    """An organisation, its members and a project."""
    organization = await admin.fetchval("select upload_pipeline.add_organization($1)", f"office {uuid4()}")
    people = {name: new_user() for name in ("owner", "admin", "member", "colleague", "viewer")}
    for name, user in people.items():
        role = "member" if name == "colleague" else name
        await admin.execute("select upload_pipeline.set_member($1, $2, $3)", organization, user, role)
    project = await admin.fetchval("select upload_pipeline.add_project($1, 'roofs')", organization)
    return Office(organization, project, **people)


async def add_photo(admin: asyncpg.Connection, owner: UUID) -> UUID:
    """A photo, not uploaded yet, of a new organisation of this owner."""
    organization = await admin.fetchval("select upload_pipeline.add_organization($1)", f"office {uuid4()}")
    await admin.execute("select upload_pipeline.set_member($1, $2, 'owner')", organization, owner)
    project = await admin.fetchval("select upload_pipeline.add_project($1, 'roofs')", organization)
    photo = uuid4()
    await reserve_photo(
        admin,
        photo_id=photo,
        user_id=owner,
        project_id=project,
        file_name="roof.jpg",
        media_type="image/jpeg",
        file_bytes=len(JPEG),
        raw_key=photo_key(project, datetime.now(UTC).date(), photo, "image/jpeg"),
        window=timedelta(minutes=20),
    )
    return photo


def announcement(project: UUID, **changed: Any) -> dict[str, Any]:
    """The body of a good announcement of `JPEG`."""
    return {
        "project_id": str(project),
        "file_name": "roof.jpg",
        "file_size": len(JPEG),
        "mime_type": "image/jpeg",
        "detection_types": ["damage"],
        **changed,
    }


async def announce(client: httpx.AsyncClient, project: UUID, **changed: Any) -> dict[str, Any]:
    """What the service answers to an announcement."""
    answer = await client.post(URL, json=announcement(project, **changed))
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def put(told: dict[str, Any], data: bytes = JPEG, **headers: str) -> httpx.Response:
    """Sends bytes as anybody who has the URL."""
    async with httpx.AsyncClient() as anybody:
        return await anybody.put(told["upload_url"], content=data, headers={**told["headers"], **headers})


async def claim_photo(db: Any, told: dict[str, Any]) -> ClaimedJob:
    """The photo's job, leased; and all others that are ready."""
    jobs = await queue.claim_jobs(db, worker_id=WORKER, pool="default", limit=1000, after_user=None, ttl=TTL)
    return next(job for job in jobs if job.job_id == UUID(told["upload_id"]))


async def lead(db: Any, job: ClaimedJob, stage: str) -> None:
    """Leads a claimed photo on to a stage, with nothing done to it."""
    path = [row.stage.value for row in PHOTO_STAGES]
    for here, there in itertools.pairwise(path):
        if path.index(job.stage) <= path.index(here) < path.index(stage):
            await queue.advance_jobs(db, [Advance(job.lease, here, there, keep=True)], ttl=TTL)


async def photo_rows(admin: asyncpg.Connection) -> int:
    """Photos and jobs."""
    count: int = await admin.fetchval(
        "select (select count(*) from upload_pipeline.photos) + (select count(*) from upload_pipeline.upload_jobs)"
    )
    return count


async def keys(service: LiveService) -> set[str]:
    """The objects in the store, but for the mark that maintenance leaves."""
    return {info.key async for info in service.resources.store.list() if info.key != MARK_KEY}
