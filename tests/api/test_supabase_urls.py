"""With files in Supabase Storage, users with tokens get its URLs, made with their own; all others the service's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from issuer import USER
from live_service import SECRET, LiveService, follow, new_user, running_service, service_settings
from s3_servers import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

from tests.simulators.object_server import Bucket
from tests.simulators.supabase_storage import API, SupabaseStorage
from tests.simulators.supabase_wire import PUBLISHABLE_KEY
from upload_pipeline.api.principals import Principal
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.orphans import sweep
from upload_pipeline.storage.store import open_store
from upload_workers.process import running_worker

CONTENT = b"# Hail\n\nThe roof was struck by hail as large as walnuts.\n"


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


@pytest.fixture
async def service(database: Any, supabase: SupabaseStorage, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(
        database.worker_url,
        tmp_path,
        storage_url=supabase.url.replace("http", "supabase+http") + "/files/claims",
        supabase_publishable_key=PUBLISHABLE_KEY,
        poll_max=0.3,
    )
    async with running_service(settings) as running:
        yield running


async def announce(client: httpx.AsyncClient, content: bytes = CONTENT) -> dict[str, Any]:
    body = {
        "filename": "hagel.md",
        "bytes_len": len(content),
        "mime": "text/markdown",
        "sha256": sha256(content).hexdigest(),
    }
    answer = await client.post("/api/v2/upload", json=body)
    assert answer.status_code == 202, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def put(told: dict[str, Any], content: bytes) -> httpx.Response:
    async with httpx.AsyncClient() as anybody:  # without credentials
        return await anybody.put(told["upload_url"], content=content, headers=told["upload_headers"])


async def test_a_file_goes_to_supabase_and_comes_back_from_it(service: LiveService, supabase: SupabaseStorage) -> None:
    user = new_user()
    client = service.client(user)
    told = await announce(client)
    key = f"claims/{raw_key(user, UUID(told['document_id']))}"
    assert told["upload_url"].startswith(f"{supabase.url}{API}/object/upload/sign/files/{key}?token=")
    assert told["upload_headers"] == {"Content-Type": "text/markdown"}
    ends = datetime.fromisoformat(told["upload_expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=14) < ends <= timedelta(minutes=15)  # the token lives for two hours; nobody waits so long
    assert (await client.post(f"/api/v2/upload/{told['document_id']}/complete")).status_code == 409
    assert (await put(told, CONTENT)).status_code == 200
    assert (await put(told, CONTENT)).json()["statusCode"] == "409"  # sent again: it is there
    assert supabase.keys("files") == {key}
    assert supabase.buckets["files"].objects[key].owner == str(user)
    assert (await client.post(f"/api/v2/upload/{told['document_id']}/complete")).status_code == 200
    async with running_worker(service.settings, service.settings.database_url.get_secret_value()):
        assert (await follow(client, told["job_id"]))[-1].data == {"state": "done"}
    hits = (await client.post("/api/v2/search", json={"query": "hail", "limit": 1})).json()["hits"]
    assert [hit["document_id"] for hit in hits] == [told["document_id"]]
    download = (await client.get(f"/api/v2/documents/{told['document_id']}/download")).json()
    assert download["download_url"].startswith(f"{supabase.url}{API}/object/sign/files/{key}?token=")
    async with httpx.AsyncClient() as anybody:
        fetched = await anybody.get(download["download_url"])
        assert (fetched.status_code, fetched.content) == (200, CONTENT)
        assert fetched.headers["content-disposition"].startswith("attachment; filename=hagel.md")
        (listed,) = (await client.get("/api/ingestion/history")).json()["items"]
        assert listed["download_url"].startswith(service.url)
        assert (await anybody.get(listed["download_url"])).content == CONTENT
    assert (await client.delete(f"/api/v2/documents/{told['document_id']}")).status_code == 204
    assert supabase.keys("files") == set()


async def test_other_bytes_than_announced_are_found_out_and_the_right_ones_can_still_be_sent(
    service: LiveService, supabase: SupabaseStorage
) -> None:
    client = service.client(new_user())
    told = await announce(client)
    wrong = await put({**told, "upload_headers": {"Content-Type": "text/html"}}, CONTENT.upper())
    assert wrong.status_code == 200  # Supabase binds neither type nor content
    async with running_worker(service.settings, service.settings.database_url.get_secret_value()):
        assert (await follow(client, told["job_id"]))[-1].data == {"state": "deadletter"}
        job = (await client.get(f"/api/v2/jobs/{told['job_id']}")).json()
        assert job["error"]["code"] == "CHECKSUM_MISMATCH"
        again = await announce(client)
        # Supabase replaces nothing, so it signs nothing for a key that is taken: the service takes the bytes.
        assert again["document_id"] == told["document_id"]
        assert again["upload_url"].startswith(service.url)
        assert (await put(again, CONTENT)).status_code == 204
        assert (await follow(client, told["job_id"]))[-1].data == {"state": "done"}
    (raw,) = [key for key in supabase.keys("files") if "/raw/" in key]
    assert supabase.buckets["files"].objects[raw].data == CONTENT


async def test_an_end_that_is_earlier_than_asked_for_is_told(service: LiveService, supabase: SupabaseStorage) -> None:
    supabase.upload_seconds = 60
    told = await announce(service.client(new_user()))
    ends = datetime.fromisoformat(told["upload_expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=50) < ends <= timedelta(seconds=60)


async def test_what_comes_after_its_document_is_gone_is_an_orphan(
    service: LiveService, supabase: SupabaseStorage, admin: asyncpg.Connection
) -> None:
    client = service.client(new_user())
    told = await announce(client)
    assert (await client.delete(f"/api/v2/documents/{told['document_id']}")).status_code == 204
    assert (await put(told, CONTENT)).status_code == 200  # the token is good for two hours whatever happens here
    assert len(supabase.keys("files")) == 1

    async def known(ids: list[UUID]) -> set[UUID]:
        rows = await admin.fetch("select document_id from upload_pipeline.documents where document_id = any($1)", ids)
        return {row["document_id"] for row in rows}

    later = datetime.now(UTC) + timedelta(hours=2)
    swept = await sweep(service.resources.store, known, now=later, grace=timedelta(hours=1))
    assert swept.objects == 1
    assert supabase.keys("files") == set()


async def test_callers_without_a_token_get_the_services_own_urls(
    service: LiveService, supabase: SupabaseStorage
) -> None:
    browser = service.client(Origin=service.url)
    assert (await browser.post("/api/ingestion/session")).status_code < 300
    told = await announce(browser)
    assert told["upload_url"].startswith(service.url)
    assert (await put(told, CONTENT)).status_code == 204
    download = (await browser.get(f"/api/v2/documents/{told['document_id']}/download")).json()
    assert download["download_url"].startswith(service.url)
    async with httpx.AsyncClient() as anybody:
        assert (await anybody.get(download["download_url"])).content == CONTENT
    assert not any("/object/" in asked for asked in supabase.requests)


async def test_policies_decide_and_a_refusal_says_nothing_to_the_caller(
    service: LiveService, supabase: SupabaseStorage
) -> None:
    supabase.policy = lambda *_: False
    body = {"filename": "a.md", "bytes_len": 1, "mime": "text/markdown", "sha256": "0" * 64}
    answer = await service.client(new_user()).post("/api/v2/upload", json=body)
    assert answer.status_code == 503
    assert "policies" not in answer.text


async def test_a_token_is_for_the_own_folder_and_shown_nowhere() -> None:
    principal = Principal(USER, frozenset(), "jwt", None, "its.own.token")
    assert principal.token_for(raw_key(USER, uuid4())) == "its.own.token"
    # what a session uploaded, which has become this user's since, lies in the session's folder
    assert principal.token_for(raw_key(uuid4(), uuid4())) is None
    assert replace(principal, token=None).token_for(raw_key(USER, uuid4())) is None
    assert "its.own.token" not in repr(principal)


async def test_a_bucket_in_a_project_is_opened_by_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    await open_store("supabase://abcdefghijklmnopqrst/files", publishable_key=PUBLISHABLE_KEY).close()
