"""Deleting photos over HTTP: what dies in between is hidden, and finished by maintenance."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from postgres_servers import Database

from tests.api.cut_short_deletions import delete_and_be_killed, maintenance
from tests.api.live_service import LiveService, running_service, service_settings
from tests.api.photo_rows import JPEG, add_office, announce, keys, photo_rows, put
from upload_pipeline.storage.photo_keys import photo_keys


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


async def test_a_service_killed_between_objects_and_rows_leaves_what_maintenance_finishes(
    service: LiveService, admin: asyncpg.Connection, database: Database
) -> None:
    office = await add_office(admin)
    client = service.client(office.member)
    told, kept = [await announce(client, office.project_id) for _ in range(2)]
    for each in (told, kept):
        assert (await put(each)).status_code == 204
    raw, kept_raw = [
        await admin.fetchval("select raw_key from upload_pipeline.photos where photo_id = $1", UUID(each["photo_id"]))
        for each in (told, kept)
    ]
    for beside in photo_keys(raw)[1:]:
        await service.resources.store.put_bytes(beside, JPEG)
    path = f"/api/v1/photos/{told['photo_id']}"
    row = f"upload_pipeline.photos where photo_id = '{told['photo_id']}'"
    await delete_and_be_killed(
        service, admin, database, user=office.member, path=path, row=row, verb="finish_photo_deletion"
    )
    assert await keys(service) == {kept_raw}
    assert await admin.fetchval(f"select deleted_at is not null from {row}")
    assert (await client.get(path)).status_code == 404
    assert [each["id"] for each in (await client.get("/api/v1/photos")).json()["items"]] == [kept["photo_id"]]
    assert (await client.get(f"/api/v2/jobs/{told['upload_id']}")).status_code == 404
    assert await maintenance(service, database) == 0  # so young a deletion may be under way elsewhere
    await admin.execute("update upload_pipeline.photos set deleted_at = deleted_at - interval '2 minutes'")
    assert await maintenance(service, database) == 1
    assert await photo_rows(admin) == 2
    assert (await client.get(f"/api/v1/photos/{kept['photo_id']}")).status_code == 200
    assert await keys(service) == {kept_raw}
