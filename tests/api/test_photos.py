"""Photos over HTTP: announced, looked at, said to be there; by whom, and by whom not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.api.job_rows import TTL
from tests.api.live_service import LiveService, new_user, running_service, service_settings
from tests.api.photo_rows import (
    JPEG,
    URL,
    Office,
    add_office,
    announce,
    announcement,
    claim_photo,
    keys,
    lead,
    photo_rows,
    put,
)
from tests.intake.failing_parts import FailingBackend
from upload_pipeline.api.resources import Resources
from upload_pipeline.database import queue
from upload_pipeline.intake import photos as intake
from upload_pipeline.storage.store import ObjectStore

PHOTOS = "/api/v1/photos"


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


@pytest.fixture
async def office(admin: asyncpg.Connection) -> Office:
    return await add_office(admin)


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_an_announcement_is_answered_as_the_contract_says(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    told = await announce(service.client(office.member), office.project_id, priority="high")
    assert told.keys() == {
        "upload_id",
        "photo_id",
        "upload_url",
        "s3_url",
        "expires_in_seconds",
        "headers",
        "status_url",
    }
    assert told["expires_in_seconds"] == 900
    assert told["headers"] == {"Content-Type": "image/jpeg"}
    row = await admin.fetchrow("select * from upload_pipeline.photos")
    day = row["created_at"].strftime("%Y/%m/%d")
    assert row["raw_key"] == f"{office.project_id}/{day}/{told['photo_id']}.jpg"
    # which directory it is stays the operator's business
    assert told["s3_url"] == f"local:///{row['raw_key']}"
    assert (row["user_id"], row["detection_types"], row["priority"]) == (office.member, ["damage"], "high")
    job = await admin.fetchrow("select * from upload_pipeline.upload_jobs")
    assert (str(job["job_id"]), job["priority"], job["pipeline"]) == (told["upload_id"], 10, "photo")


async def test_each_announcement_makes_another_photo(service: LiveService, office: Office) -> None:
    client = service.client(office.member)
    first, second = [await announce(client, office.project_id) for _ in range(2)]
    assert first["photo_id"] != second["photo_id"]
    assert first["upload_id"] != second["upload_id"]


REFUSED: list[tuple[dict[str, Any], tuple[int, str]]] = [
    ({"file_name": "roof.gif", "mime_type": "image/gif"}, (415, "UNSUPPORTED_TYPE")),
    ({"mime_type": "image/png"}, (415, "TYPE_MISMATCH")),
    ({"file_name": "roof.png"}, (415, "TYPE_MISMATCH")),
    ({"file_name": "roof"}, (415, "UNSUPPORTED_TYPE")),
    ({"file_name": "roof.jpg.exe"}, (415, "UNSUPPORTED_TYPE")),
    ({"file_size": 1023}, (400, "FILE_TOO_SMALL")),
    ({"file_size": 0}, (400, "INVALID_ARGUMENT")),
    ({"file_size": -1}, (400, "INVALID_ARGUMENT")),
    ({"file_size": "a lot"}, (400, "INVALID_ARGUMENT")),
    ({"file_size": 50 * 1024 * 1024 + 1}, (413, "FILE_TOO_LARGE")),
    ({"detection_types": ["weather"]}, (400, "INVALID_ARGUMENT")),
    ({"detection_types": "damage"}, (400, "INVALID_ARGUMENT")),
    ({"priority": "urgent"}, (400, "INVALID_ARGUMENT")),
    ({"project_id": "7"}, (400, "INVALID_ARGUMENT")),
    ({"extra": 1}, (400, "INVALID_ARGUMENT")),
    ({"project_id": str(uuid4())}, (404, "PROJECT_NOT_FOUND")),
]


async def test_what_cannot_be_a_photo_is_refused_and_leaves_nothing(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    for changed, answer in REFUSED:
        refused = await client.post(URL, json=announcement(office.project_id, **changed))
        assert code(refused) == answer, changed
    assert await photo_rows(admin) == 0


TAKEN: list[tuple[dict[str, Any], str]] = [
    ({"file_size": 1024}, "jpg"),
    ({"file_size": 50 * 1024 * 1024}, "jpg"),
    ({"file_name": "ROOF.JPEG", "mime_type": "image/JPEG"}, "jpg"),
    ({"file_name": "../../roof\x00.png", "mime_type": "image/png"}, "png"),
    ({"detection_types": ["damage", "material", "damage"]}, "jpg"),
]


async def test_what_may_be_a_photo_is_taken(service: LiveService, office: Office) -> None:
    client = service.client(office.member)
    for changed, extension in TAKEN:
        told = await announce(client, office.project_id, **changed)
        shown = (await client.get(told["status_url"])).json()
        assert shown["s3_url"].endswith(f"{told['photo_id']}.{extension}")
        assert "/" not in shown["file_name"]
        assert len(shown["detection_types"]) == len(set(shown["detection_types"]))


async def test_what_a_role_may_do(service: LiveService, admin: asyncpg.Connection, office: Office) -> None:
    assert code(await service.client(office.viewer).post(URL, json=announcement(office.project_id))) == (
        403,
        "FORBIDDEN",
    )
    told = await announce(service.client(office.member), office.project_id)
    photo = f"{PHOTOS}/{told['photo_id']}"
    for user in (office.owner, office.admin, office.member, office.colleague, office.viewer):
        assert (await service.client(user).get(photo)).status_code == 200
        assert len((await service.client(user).get(PHOTOS)).json()["items"]) == 1
    assert (await put(told)).status_code == 204
    uploaded = {"status": "uploaded"}
    assert code(await service.client(office.viewer).patch(f"{photo}/status", json=uploaded)) == (403, "FORBIDDEN")
    assert (await service.client(office.colleague).patch(f"{photo}/status", json=uploaded)).status_code == 200
    for user in (office.viewer, office.colleague):
        assert code(await service.client(user).delete(photo)) == (403, "FORBIDDEN")
    assert (await service.client(office.admin).delete(photo)).status_code == 204
    for user in (office.owner, office.colleague):
        assert code(await service.client(user).delete(photo)) == (404, "PHOTO_NOT_FOUND")
    assert await photo_rows(admin) == 0


async def test_another_organisation_finds_nothing(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    told = await announce(service.client(office.member), office.project_id)
    photo = f"{PHOTOS}/{told['photo_id']}"
    other = await add_office(admin)
    for user in (other.owner, new_user()):
        client = service.client(user)
        for asked in (
            client.get(photo),
            client.delete(photo),
            client.patch(f"{photo}/status", json={"status": "uploaded"}),
        ):
            assert code(await asked) == (404, "PHOTO_NOT_FOUND")
        assert code(await client.post(URL, json=announcement(office.project_id))) == (404, "PROJECT_NOT_FOUND")
        assert code(await client.get(PHOTOS, params={"project_id": str(office.project_id)})) == (
            404,
            "PROJECT_NOT_FOUND",
        )
        assert (await client.get(PHOTOS)).json() == {"items": [], "next_cursor": None}
    assert code(await service.client(other.owner).get(f"/api/v2/jobs/{told['upload_id']}")) == (404, "JOB_NOT_FOUND")


async def test_saying_that_it_is_there_before_it_is_changes_nothing(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    answer = await client.patch(f"{PHOTOS}/{told['photo_id']}/status", json={"status": "uploaded"})
    assert code(answer) == (409, "OBJECT_MISSING")
    assert (await client.get(told["status_url"])).json()["status"] == "pending_upload"
    assert await admin.fetchval("select count(*) from upload_pipeline.events where code = 'photo_status_changed'") == 1


async def test_a_photo_comes_is_worked_on_and_is_completed(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    await service.resources.store.put_bytes((await admin.fetchval("select raw_key from upload_pipeline.photos")), JPEG)
    patched = await client.patch(f"{PHOTOS}/{told['photo_id']}/status", json={"status": "uploaded"})
    assert (patched.status_code, patched.json()["status"]) == (200, "uploaded")
    job = await claim_photo(admin, told)
    for stage, status in (
        ("uploaded", "uploaded"),
        ("extracting", "processing"),
        ("detecting", "processing"),
        ("completed", "completed"),
    ):
        await lead(admin, replace(job, stage=job.stage), stage)
        shown = (await client.get(told["status_url"])).json()
        assert shown["status"] == status
        job = replace(job, stage=stage)
    assert [change["status"] for change in shown["status_history"]] == [
        "pending_upload",
        "uploaded",
        "processing",
        "completed",
    ]
    times = [change["at"] for change in shown["status_history"]]
    assert times == sorted(times)
    assert shown["uploaded_at"] == times[1]
    assert (shown["exif_data"], shown["detections"], shown["error"], shown["thumbnail_url"]) == ({}, None, None, None)
    # said late, and said twice
    for _ in range(2):
        again = await client.patch(f"{PHOTOS}/{told['photo_id']}/status", json={"status": "uploaded"})
        assert (again.status_code, again.json()["status"]) == (200, "completed")
    told_job = (await client.get(f"/api/v2/jobs/{told['upload_id']}")).json()
    assert (told_job["photo_id"], told_job["document_id"], told_job["progress"]) == (told["photo_id"], None, 100)
    (listed,) = (await client.get("/api/v2/jobs", params={"pipeline": "photo"})).json()["items"]
    assert listed == told_job


async def test_a_job_that_waits_for_a_photo_has_an_estimate(service: LiveService, office: Office) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    job = (await client.get(f"/api/v2/jobs/{told['upload_id']}")).json()
    assert (job["queued_ahead"], job["progress"]) == (0, 0)
    assert job["estimated_completion_at"] is not None


async def test_a_photo_that_comes_after_its_job_gave_it_up_is_taken_up_again(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    job = await claim_photo(admin, told)
    await queue.fail_job(admin, job.lease, code="UPLOAD_EXPIRED", message="It did not come.", retryable=False)
    path = f"{PHOTOS}/{told['photo_id']}/status"
    assert (await client.get(told["status_url"])).json()["error"]["code"] == "UPLOAD_EXPIRED"
    assert code(await client.patch(path, json={"status": "uploaded"})) == (409, "OBJECT_MISSING")
    await service.resources.store.put_bytes((await admin.fetchval("select raw_key from upload_pipeline.photos")), JPEG)
    shown = (await client.patch(path, json={"status": "uploaded"})).json()
    assert (shown["status"], shown["error"]) == ("uploaded", None)
    assert await admin.fetchval("select state::text from upload_pipeline.upload_jobs") == "queued"


async def test_two_who_say_it_at_once_are_both_right(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    await service.resources.store.put_bytes((await admin.fetchval("select raw_key from upload_pipeline.photos")), JPEG)
    path = f"{PHOTOS}/{told['photo_id']}/status"
    answers = await asyncio.gather(*(client.patch(path, json={"status": "uploaded"}) for _ in range(6)))
    assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "uploaded")}
    assert await admin.fetchval("select count(*) from upload_pipeline.events where code = 'photo_status_changed'") == 2


async def test_what_is_no_status_or_the_services_to_reach_nobody_can_say(service: LiveService, office: Office) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    path = f"{PHOTOS}/{told['photo_id']}/status"
    for wanted in ("processing", "completed", "failed"):
        refused = await client.patch(path, json={"status": wanted})
        assert code(refused) == (409, "INVALID_STATE")
        assert refused.json()["error"]["details"]["status"] == "pending_upload"
        assert "'pending_upload'" in refused.json()["error"]["message"]
    bad: list[Any] = [{}, {"status": "lost"}, {"status": None}, {"status": "uploaded", "more": 1}, []]
    for body in bad:
        assert code(await client.patch(path, json=body)) == (400, "INVALID_ARGUMENT")
    assert (await client.get(told["status_url"])).json()["status"] == "pending_upload"


async def test_a_failed_photo_says_why_and_is_retried_by_its_job(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told = await announce(client, office.project_id)
    assert (await put(told)).status_code == 204
    job = await claim_photo(admin, told)
    await lead(admin, job, "extracting")
    await queue.fail_job(
        admin, job.lease, code="CORRUPT_FILE", message="It is cut short.", retryable=False, details={"at": 9}
    )
    shown = (await client.get(told["status_url"])).json()
    assert (shown["status"], shown["error"]) == (
        "failed",
        {"code": "CORRUPT_FILE", "message": "It is cut short.", "details": {"at": 9}},
    )
    # colleagues see it as well, though the job is not theirs
    assert (await service.client(office.viewer).get(told["status_url"])).json()["error"] == shown["error"]
    assert (await service.client(office.viewer).get(f"/api/v2/jobs/{told['upload_id']}")).status_code == 404
    refused = await client.patch(f"{PHOTOS}/{told['photo_id']}/status", json={"status": "uploaded"})
    assert code(refused) == (409, "INVALID_STATE")
    assert refused.json()["error"]["details"]["status"] == "failed"
    assert (await client.post(f"/api/v2/jobs/{told['upload_id']}/retry")).status_code == 200
    shown = (await client.get(told["status_url"])).json()
    assert (shown["status"], shown["error"]) == ("processing", None)
    assert [change["status"] for change in shown["status_history"]][-2:] == ["failed", "processing"]


async def test_a_list_is_paged_by_project_and_status(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    second = await admin.fetchval("select upload_pipeline.add_project($1, 'walls')", office.organization_id)
    made = [await announce(client, project) for project in (office.project_id, second) * 3]
    newest = [told["photo_id"] for told in reversed(made)]
    assert (await put(made[0])).status_code == 204

    async def pages(**filters: Any) -> list[str]:
        found, cursor = [], None
        while True:
            answer = await client.get(PHOTOS, params={"limit": 2, **filters, **({"cursor": cursor} if cursor else {})})
            assert answer.status_code == 200, answer.text
            page = answer.json()
            assert len(page["items"]) <= 2
            found += [item["id"] for item in page["items"]]
            if (cursor := page["next_cursor"]) is None:
                return found

    assert await pages() == newest
    assert await pages(project_id=second) == newest[::2]
    assert await pages(status="uploaded") == [made[0]["photo_id"]]
    assert await pages(status="pending_upload", project_id=office.project_id) == newest[1:-1:2]
    assert await pages(status="failed") == []
    for bad in ({"status": "lost"}, {"project_id": "x"}, {"limit": 0}, {"cursor": "x"}):
        assert (await client.get(PHOTOS, params=bad)).status_code == 400  # type: ignore[arg-type]


async def test_a_hundred_urls_a_minute(database: Any, tmp_path: Path, admin: asyncpg.Connection) -> None:
    office = await add_office(admin)
    async with running_service(
        service_settings(database.worker_url, tmp_path, limit_photo_urls_per_minute=3)
    ) as service:
        client = service.client(office.member)
        for _ in range(3):
            await announce(client, office.project_id)
        refused = await client.post(URL, json=announcement(office.project_id))
        assert code(refused) == (429, "RATE_LIMITED")
        assert (refused.headers["X-RateLimit-Limit"], refused.headers["X-RateLimit-Remaining"]) == ("3", "0")
        assert 1 <= int(refused.headers["Retry-After"]) <= 20
        # of a user, and not of the organisation
        await announce(service.client(office.colleague), office.project_id)
    assert type(service.settings).model_fields["limit_photo_urls_per_minute"].default == 100


@pytest.mark.parametrize(("failures", "answer"), [(0, 200), (3, 200), (4, 503)])
async def test_a_store_that_fails_is_asked_three_times_more(
    database: Any,
    tmp_path: Path,
    admin: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
    answer: int,
) -> None:
    assert intake.STORAGE_RETRY_DELAYS == (1.0, 2.0, 4.0)
    monkeypatch.setattr(intake, "STORAGE_RETRY_DELAYS", (0.01, 0.02, 0.04))
    failing: list[FailingBackend] = []

    def change(resources: Resources) -> Resources:
        failing.append(FailingBackend(resources.store.backend, "sign_put", times=failures))
        return replace(resources, store=ObjectStore(failing[0]))  # type: ignore[arg-type]

    office = await add_office(admin)
    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        told = await service.client(office.member).post(URL, json=announcement(office.project_id))
    assert told.status_code == answer
    assert failing[0].times == 0
    if answer == 503:
        assert told.json()["error"]["code"] == "STORAGE_UNAVAILABLE"
    assert await photo_rows(admin) == (2 if answer == 200 else 0)


async def test_deleting_ends_the_job_and_takes_every_object(
    service: LiveService, admin: asyncpg.Connection, office: Office
) -> None:
    client = service.client(office.member)
    told, kept = [await announce(client, office.project_id) for _ in range(2)]
    for each in (told, kept):
        assert (await put(each)).status_code == 204
    raw = await admin.fetchval("select raw_key from upload_pipeline.photos where photo_id = $1", UUID(told["photo_id"]))
    stem = raw.removesuffix(".jpg")
    for beside in (f"{stem}.thumbnail.jpg", f"{stem}.shared.jpg"):
        await service.resources.store.put_bytes(beside, JPEG)
    job = await claim_photo(admin, told)
    assert (await client.delete(told["status_url"])).status_code == 204
    # a worker that is busy with it is fenced off
    assert (
        await queue.advance_jobs(admin, [queue.Advance(job.lease, "pending_upload", "uploaded", True)], ttl=TTL) == {}
    )
    assert len(await keys(service)) == 1
    assert code(await client.delete(told["status_url"])) == (404, "PHOTO_NOT_FOUND")
    assert code(await client.get(told["status_url"])) == (404, "PHOTO_NOT_FOUND")
    assert code(await put(told)) == (404, "PHOTO_NOT_FOUND")
    assert (await client.get(kept["status_url"])).status_code == 200


async def test_a_deletion_that_the_store_breaks_off_hides_the_photo_and_is_ended_by_the_next_call(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    office = await add_office(admin)
    failing: list[FailingBackend] = []

    def change(resources: Resources) -> Resources:
        failing.append(FailingBackend(resources.store.backend, "delete", times=2))
        return replace(resources, store=ObjectStore(failing[0]))  # type: ignore[arg-type]

    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        client = service.client(office.member)
        told = await announce(client, office.project_id)
        assert (await put(told)).status_code == 204
        for _ in range(2):
            assert code(await client.delete(told["status_url"])) == (503, "STORAGE_UNAVAILABLE")
            assert code(await client.get(told["status_url"])) == (404, "PHOTO_NOT_FOUND")
        assert (await client.get(PHOTOS)).json()["items"] == []
        assert code(await service.client(office.viewer).delete(told["status_url"])) == (404, "PHOTO_NOT_FOUND")
        assert len(await keys(service)) == 1
        assert (await client.delete(told["status_url"])).status_code == 204
        assert await keys(service) == set()
    assert await photo_rows(admin) == 0
