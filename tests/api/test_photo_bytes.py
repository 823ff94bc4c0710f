"""The bytes of announced photos, where this service takes them itself: by a URL that carries its own permission."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from tests.api.live_service import LiveService, running_service, service_settings
from tests.api.photo_rows import JPEG, Office, add_office, announce, claim_photo, keys, lead, put
from tests.intake.failing_parts import FailingBackend, HookedDatabase
from upload_pipeline.storage.photo_keys import shared_key, thumbnail_key
from upload_pipeline.storage.signed_urls import Grant
from upload_pipeline.storage.store import ObjectStore


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


@pytest.fixture
async def office(admin: asyncpg.Connection) -> Office:
    return await add_office(admin)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def status(service: LiveService, office: Office, told: dict[str, Any]) -> str:
    return str((await service.client(office.viewer).get(told["status_url"])).json()["status"])


async def test_just_these_bytes_come_and_the_job_looks_at_once(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    told = await announce(service.client(office.member), office.project_id)
    await admin.execute(
        "update upload_pipeline.upload_jobs set state = 'retryable', run_at = now() + interval '1 hour'"
    )
    for data, headers, answer in (
        (JPEG, {"Content-Type": "image/png"}, (400, "INVALID_ARGUMENT")),
        (JPEG[:-1], {}, (400, "INVALID_ARGUMENT")),
        (JPEG + b"x", {}, (400, "INVALID_ARGUMENT")),
    ):
        assert code(await put(told, data, **headers)) == answer
    assert await keys(service) == set()
    assert await status(service, office, told) == "pending_upload"
    assert (await put(told)).status_code == 204
    raw = await admin.fetchval("select raw_key from upload_pipeline.photos")
    assert await service.resources.store.get_bytes(raw, len(JPEG)) == JPEG
    assert await keys(service) == {raw}
    assert await status(service, office, told) == "uploaded"
    assert await admin.fetchval("select state::text from upload_pipeline.upload_jobs") == "queued"


async def test_they_can_be_sent_again_until_they_are_checked(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    told = await announce(service.client(office.member), office.project_id)
    other = JPEG[:-1] + b"!"
    answers = await asyncio.gather(put(told), put(told, other))
    assert {answer.status_code for answer in answers} == {204}
    assert (await put(told)).status_code == 204
    await lead(admin, await claim_photo(admin, told), "uploaded")
    assert code(await put(told, other)) == (409, "INVALID_STATE")
    raw = await admin.fetchval("select raw_key from upload_pipeline.photos")
    assert await service.resources.store.get_bytes(raw, len(JPEG)) == JPEG


async def test_a_slow_put_does_not_take_the_place_of_what_was_looked_at_meanwhile(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, office: Office
) -> None:
    async def come_and_be_looked_at() -> None:
        assert (await put(told)).status_code == 204
        await lead(admin, await claim_photo(admin, told), "completed")

    def change(resources: Any) -> Any:
        # the slow one was let in: its photo was looked up, and is not being deleted
        hooked = HookedDatabase(resources.db, after={("photos", 1): come_and_be_looked_at})
        return replace(resources, intake=replace(resources.intake, db=hooked))

    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        told = await announce(service.client(office.member), office.project_id)
        assert code(await put(told, JPEG[:-1] + b"!")) == (409, "INVALID_STATE")
        raw = await admin.fetchval("select raw_key from upload_pipeline.photos")
        assert await service.resources.store.get_bytes(raw, len(JPEG)) == JPEG
        assert await keys(service) == {raw}


async def test_a_late_put_and_a_url_of_something_else_are_refused(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    told, other = [await announce(service.client(office.member), office.project_id) for _ in range(2)]
    photo = UUID(told["photo_id"])
    raw = await admin.fetchval("select raw_key from upload_pipeline.photos where photo_id = $1", photo)
    good = Grant("PUT", photo, raw, datetime.now(UTC) + timedelta(minutes=15), len(JPEG), "image/jpeg")

    async def send(grant: Grant, to: str = told["photo_id"]) -> tuple[int, str]:
        token = service.resources.signer.sign(grant)
        url = f"{service.url}/api/v1/photos/{to}/bytes?token={token}"
        return code(await put({**told, "upload_url": url}))

    assert await send(replace(good, expires_at=datetime.now(UTC))) == (403, "SIGNED_URL_EXPIRED")
    invalid = (403, "SIGNED_URL_INVALID")
    assert await send(good, to=other["photo_id"]) == invalid
    assert await send(replace(good, method="GET")) == invalid
    assert await send(replace(good, key=thumbnail_key(raw))) == invalid
    assert await send(replace(good, key=f"raw/{uuid4()}/{photo}")) == invalid
    assert await send(replace(good, document_id=uuid4())) == invalid
    assert await send(replace(good, file_bytes=None)) == invalid
    # a photo's URL is none of a document's
    query = urlsplit(told["upload_url"]).query
    answer = await put({**told, "upload_url": f"{service.url}/api/v2/upload/{photo}/bytes?{query}"})
    assert code(answer) == invalid
    assert await keys(service) == set()


async def test_what_fails_on_the_way_leaves_nothing_and_can_be_sent_again(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, office: Office
) -> None:
    failing: list[FailingBackend] = []

    def change(resources: Any) -> Any:
        failing.append(FailingBackend(resources.store.backend, ""))
        return replace(resources, intake=replace(resources.intake, store=ObjectStore(failing[0])))  # type: ignore[arg-type]

    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        told = await announce(service.client(office.member), office.project_id)
        for method, after in (("write", False), ("write", True), ("move", False)):
            failing[0].method, failing[0].after, failing[0].times = method, after, 1
            assert code(await put(told)) == (503, "STORAGE_UNAVAILABLE")
            assert await keys(service) == set()
            assert await status(service, office, told) == "pending_upload"
        assert (await put(told)).status_code == 204


async def test_a_photo_that_is_deleted_while_its_bytes_come_takes_them_along(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, office: Office
) -> None:
    async def delete() -> None:
        photo = await admin.fetchval("select photo_id from upload_pipeline.photos")
        await admin.execute("select upload_pipeline.begin_photo_deletion($1)", photo)
        await admin.execute("select upload_pipeline.finish_photo_deletion($1)", photo)

    def change(resources: Any) -> Any:
        hooked = HookedDatabase(resources.db, before={("announce_photo", 1): delete})
        return replace(resources, intake=replace(resources.intake, db=hooked))

    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        told = await announce(service.client(office.member), office.project_id)
        assert code(await put(told)) == (404, "PHOTO_NOT_FOUND")
        assert await keys(service) == set()


async def test_what_is_handed_out_is_the_copy_that_tells_no_place_and_nothing_before_it_was_looked_at(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    assert (await put(told)).status_code == 204
    assert (await client.get(told["status_url"])).json()["download_url"] is None
    await admin.execute("update upload_pipeline.photos set width = 64, height = 48")
    shown = (await client.get(told["status_url"])).json()
    raw = await admin.fetchval("select raw_key from upload_pipeline.photos")
    async with httpx.AsyncClient() as anybody:
        fetched = await anybody.get(shown["download_url"])
        assert (fetched.content, fetched.headers["Content-Type"]) == (JPEG, "image/jpeg")
        assert 'filename="roof.jpg"' in fetched.headers["Content-Disposition"]
        await service.resources.store.put_bytes(shared_key(raw), b"no place")
        await admin.execute("update upload_pipeline.photos set shared_key = $1", shared_key(raw))
        shown = (await client.get(told["status_url"])).json()
        assert (await anybody.get(shown["download_url"])).content == b"no place"
        assert shown["s3_url"].endswith(".shared.jpg")


async def test_a_thumbnail_has_a_url_until_the_photo_is_deleted(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    raw = await admin.fetchval("select raw_key from upload_pipeline.photos")
    await service.resources.store.put_bytes(thumbnail_key(raw), JPEG)
    await admin.execute("update upload_pipeline.photos set thumbnail_key = $1", thumbnail_key(raw))
    (listed,) = (await client.get("/api/v1/photos")).json()["items"]
    shown = (await service.client(office.viewer).get(told["status_url"])).json()
    async with httpx.AsyncClient() as anybody:
        for url in (listed["thumbnail_url"], shown["thumbnail_url"]):
            fetched = await anybody.get(url)
            assert (fetched.status_code, fetched.content) == (200, JPEG)
            assert fetched.headers["Content-Type"] == "image/jpeg"
            assert "roof thumbnail.jpg" in fetched.headers["Content-Disposition"]
        await service.resources.store.delete([thumbnail_key(raw)])
        assert code(await anybody.get(url)) == (409, "OBJECT_MISSING")
        assert (await client.delete(told["status_url"])).status_code == 204
        assert code(await anybody.get(url)) == (404, "PHOTO_NOT_FOUND")
