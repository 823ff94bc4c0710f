"""Photos where objects are kept in a bucket: their bytes go there by its own URLs, past the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from s3_servers import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

from tests.api.live_service import SECRET, LiveService, running_service, service_settings
from tests.api.photo_rows import JPEG, add_office, announce, keys, put
from tests.simulators.object_server import Bucket
from tests.simulators.supabase_storage import API, SupabaseStorage
from tests.simulators.supabase_wire import PUBLISHABLE_KEY


@pytest.fixture
async def bucket(database: Any, tmp_path: Path, s3_bucket: str) -> AsyncIterator[LiveService]:
    settings = service_settings(database.worker_url, tmp_path, storage_url=f"s3://{s3_bucket}/files")
    async with running_service(settings) as running:
        yield running


@pytest.fixture
async def supabase(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SupabaseStorage]:
    for name, given in (
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY_ID),
        ("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY),
        ("AWS_REGION", REGION),
    ):
        monkeypatch.setenv(name, given)
    async with SupabaseStorage(buckets={"files": Bucket()}, jwt_secret=SECRET) as server:
        yield server


async def test_just_the_announced_length_and_type_go_to_the_bucket(
    bucket: LiveService, admin: asyncpg.Connection, s3_bucket: str
) -> None:
    office = await add_office(admin)
    client = bucket.client(office.member)
    told = await announce(client, office.project_id)
    raw = await admin.fetchval("select raw_key from upload_pipeline.photos")
    assert told["s3_url"] == f"s3://{s3_bucket}/files/{raw}"
    assert not told["upload_url"].startswith(bucket.url)
    assert told["expires_in_seconds"] == 900
    assert "X-Amz-Expires=900" in told["upload_url"]
    path = f"{told['status_url']}/status"
    assert (await client.patch(path, json={"status": "uploaded"})).json()["error"]["code"] == "OBJECT_MISSING"
    for data, headers in (
        (JPEG[:-1], {"Content-Length": str(len(JPEG) - 1)}),
        (JPEG + b"x", {"Content-Length": str(len(JPEG) + 1)}),
        (JPEG, {"Content-Type": "image/png"}),
    ):
        assert (await put(told, data, **headers)).status_code == 403
    assert await keys(bucket) == set()
    assert (await put(told)).status_code == 200
    assert await bucket.resources.store.get_bytes(raw, len(JPEG)) == JPEG
    answer = await client.patch(path, json={"status": "uploaded"})
    assert (answer.status_code, answer.json()["status"]) == (200, "uploaded")
    assert (await client.delete(told["status_url"])).status_code == 204
    assert await keys(bucket) == set()


async def test_a_late_put_is_refused_by_the_bucket(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, s3_bucket: str
) -> None:
    office = await add_office(admin)
    settings = service_settings(
        database.worker_url, tmp_path, storage_url=f"s3://{s3_bucket}/files", upload_url_seconds=1
    )
    async with running_service(settings) as service:
        client = service.client(office.member)
        told = await announce(client, office.project_id)
        assert told["expires_in_seconds"] == 1
        await asyncio.sleep(1.1)
        assert (await put(told)).status_code == 403
        assert await keys(service) == set()
        answer = await client.patch(f"{told['status_url']}/status", json={"status": "uploaded"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "OBJECT_MISSING")


async def test_a_member_with_a_token_gets_supabases_url_where_its_policies_let_them(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, supabase: SupabaseStorage
) -> None:
    office = await add_office(admin)
    settings = service_settings(
        database.worker_url,
        tmp_path,
        storage_url=supabase.url.replace("http", "supabase+http") + "/files/claims",
        supabase_publishable_key=PUBLISHABLE_KEY,
    )
    supabase.policy = lambda action, bucket, name, user: (
        (action, bucket, user) == ("insert", "files", str(office.member))
        and name.startswith(f"claims/{office.project_id}/")
    )
    async with running_service(settings) as service:
        client = service.client(office.member)
        told = await announce(client, office.project_id)
        key = await admin.fetchval("select raw_key from upload_pipeline.photos")
        assert told["upload_url"].startswith(f"{supabase.url}{API}/object/upload/sign/files/claims/{key}?token=")
        assert 890 < told["expires_in_seconds"] <= 900
        assert (await put(told)).status_code == 200
        answer = await client.patch(f"{told['status_url']}/status", json={"status": "uploaded"})
        assert answer.json()["status"] == "uploaded"
        # refused by the policies of the bucket, and not by those of the organisation: the service takes the bytes
        other = await announce(service.client(office.colleague), office.project_id)
        assert other["upload_url"].startswith(service.url)
        assert (await put(other)).status_code == 204
        photo = UUID(other["photo_id"])
        key = await admin.fetchval("select raw_key from upload_pipeline.photos where photo_id = $1", photo)
        assert f"claims/{key}" in supabase.keys("files")
        supabase.upload_seconds = 60
        told = await announce(client, office.project_id)
        assert 50 < told["expires_in_seconds"] <= 60
