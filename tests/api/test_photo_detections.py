"""The callback of a team's own model: what it changes, and everything that it is refused for."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from in_process import Api, open_api

from tests.detection_jobs import WaitingPhoto, add_project, add_waiting_photo, photo_of
from tests.simulators.detection_model import signature
from upload_pipeline.api.photo_detections import MAX_CALLBACK_BYTES
from upload_pipeline.providers.detection import MAX_DETECTIONS, MAX_LABEL_CHARS, MAX_NOTE_CHARS

SECRET = "a secret that two services share, 32+"
USER = uuid4()
FOUND = {
    "type": "damage",
    "label": "dent",
    "confidence": 0.5,
    "box": {"x": 0.1, "y": 0.2, "width": 0.3, "height": 0.4},
    "note": "",
}


@pytest.fixture
async def api(database: Any, tmp_path: Path) -> AsyncIterator[Api]:
    async with open_api(database, tmp_path, detection_secret=SECRET) as api:
        yield api


@pytest.fixture
async def photo(admin: asyncpg.Connection) -> WaitingPhoto:
    return await add_waiting_photo(admin, await add_project(admin, USER), USER)


async def post(
    api: Api, path_photo: UUID, body: Any, *, secret: str = SECRET, at: float | None = None, **headers: str
) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    signed = {"X-Upload-Pipeline-Signature": signature(raw, secret, at=at or time.time()), **headers}
    return await api.client.post(
        f"/api/v1/photos/{path_photo}/detections",
        content=raw,
        headers={"Content-Type": "application/json", **{name: value for name, value in signed.items() if value}},
    )


def report(photo: WaitingPhoto, *found: Any) -> dict[str, Any]:
    return {"photo_id": str(photo.photo_id), "detections": list(found)}


async def test_detections_complete_the_photo_and_the_same_again_changes_nothing(
    api: Api, admin: asyncpg.Connection, photo: WaitingPhoto
) -> None:
    answer = await post(api, photo.photo_id, report(photo, FOUND))
    assert (answer.status_code, answer.json()) == (
        200,
        {"photo_id": str(photo.photo_id), "status": "completed", "repeated": False},
    )
    row = await photo_of(admin, photo.photo_id)
    assert (row["status"], row["state"], row["detector"]) == ("completed", "done", "webhook")
    assert json.loads(row["detections"]) == [FOUND]
    # the same said otherwise: another order, other white space, a note that is left out
    said_otherwise = json.dumps(report(photo, {"box": FOUND["box"], **FOUND}), indent=4).encode()
    for again in (report(photo, FOUND), said_otherwise):
        repeated = await post(api, photo.photo_id, again)
        assert (repeated.status_code, repeated.json()["repeated"]) == (200, True)
    other = await post(api, photo.photo_id, report(photo))
    assert (other.status_code, other.json()["error"]["code"]) == (409, "INVALID_STATE")
    assert json.loads((await photo_of(admin, photo.photo_id))["detections"]) == [FOUND]


async def test_an_error_fails_the_photo_with_the_models_words(
    api: Api, admin: asyncpg.Connection, photo: WaitingPhoto
) -> None:
    answer = await post(api, photo.photo_id, {"photo_id": str(photo.photo_id), "error": "Too dark."})
    assert (answer.status_code, answer.json()["status"]) == (200, "failed")
    row = await photo_of(admin, photo.photo_id)
    assert (row["status"], row["state"], row["error_code"], row["error_message"]) == (
        "failed",
        "deadletter",
        "DETECT_FAILED",
        "Too dark.",
    )


WRONG: list[dict[str, Any]] = [
    {"secret": SECRET + "x"},
    {"at": 1.0},
    {"at": time.time() + 1_000_000},
    {"X-Upload-Pipeline-Signature": ""},
    {"X-Upload-Pipeline-Signature": "t=1,v1=00"},
]


async def test_a_message_that_is_not_signed_well_is_refused_and_changes_nothing(
    api: Api, admin: asyncpg.Connection, photo: WaitingPhoto
) -> None:
    for path, wrong in itertools.product((photo.photo_id, uuid4()), WRONG):
        answer = await post(api, path, report(photo, FOUND), **wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "UNAUTHENTICATED")
        assert SECRET not in answer.text
    assert (await photo_of(admin, photo.photo_id))["state"] == "queued"


async def test_a_message_for_one_photo_is_none_for_another(
    api: Api, admin: asyncpg.Connection, photo: WaitingPhoto
) -> None:
    other = await add_waiting_photo(admin, await add_project(admin, USER), USER)
    answer = await post(api, other.photo_id, report(photo, FOUND))
    assert (answer.status_code, answer.json()["error"]["details"]["fields"][0]["field"]) == (400, "photo_id")
    assert (await photo_of(admin, other.photo_id))["state"] == "queued"


UNFIT: list[tuple[Any, str]] = [
    (b"", "body"),
    (b"{", "body"),
    (b"[]", "body"),
    (b"[" * 100_000, "body"),
    (b'"\xff"', "body"),
    ({}, "body"),
    ({"detections": [], "error": "both"}, "body"),
    ({"detections": None}, "detections"),
    ({"error": None}, "detections"),
    ({"error": ""}, "error"),
    ({"error": "x" * 1001}, "error"),
    ({"error": "a\0b"}, "error"),
    ({"error": "\ud800"}, "error"),
    ({"detections": [], "model": "mine"}, "model"),
    ({"detections": {}}, "detections"),
    ({"detections": [{**FOUND, "severity": 3}]}, "detections.0.severity"),
    ({"detections": [{**FOUND, "type": "weather"}]}, "detections[0].type"),
    ({"detections": [{**FOUND, "confidence": "0.5"}]}, "detections[0]"),
    ({"detections": [{**FOUND, "confidence": float("nan")}]}, "detections.0.confidence"),
    ({"detections": [{**FOUND, "box": {"x": 0.9, "y": 0, "width": 0.2, "height": 1}}]}, "detections[0]"),
    ({"detections": [{key: value for key, value in FOUND.items() if key != "box"}]}, "detections.0.box"),
]


async def test_a_body_that_does_not_validate_is_refused_and_the_field_named(
    api: Api, admin: asyncpg.Connection, photo: WaitingPhoto
) -> None:
    for body, field in UNFIT:
        whole = {"photo_id": str(photo.photo_id), **body} if isinstance(body, dict) else body
        answer = await post(api, photo.photo_id, whole)
        assert answer.status_code == 400, (body, answer.text)
        error = answer.json()["error"]
        assert (error["code"], error["details"]["fields"][0]["field"]) == ("INVALID_ARGUMENT", field), body
    assert (await photo_of(admin, photo.photo_id))["state"] == "queued"


async def test_as_many_detections_as_there_may_be_are_taken_each_as_long_as_it_may_be(
    api: Api, admin: asyncpg.Connection, photo: WaitingPhoto
) -> None:
    # beyond what two bytes hold, and so twelve bytes of JSON each
    longest = {**FOUND, "label": "\U0001f525" * MAX_LABEL_CHARS, "note": "\U0001f525" * MAX_NOTE_CHARS}
    answer = await post(api, photo.photo_id, report(photo, *[longest] * MAX_DETECTIONS))
    assert answer.status_code == 200, answer.text
    assert json.loads((await photo_of(admin, photo.photo_id))["detections"]) == [longest] * MAX_DETECTIONS


async def test_a_body_without_end_is_not_read_to_its_end(api: Api, photo: WaitingPhoto) -> None:
    assert (await post(api, photo.photo_id, b" " * (MAX_CALLBACK_BYTES + 1))).status_code == 413


async def test_a_photo_that_is_not_there_or_is_deleted_or_waits_for_nothing(
    api: Api, admin: asyncpg.Connection, photo: WaitingPhoto
) -> None:
    missing = WaitingPhoto(uuid4(), uuid4(), b"")
    early = await add_waiting_photo(admin, await add_project(admin, USER), USER, stage="uploaded")
    for one, status in ((missing, 404), (early, 409)):
        assert (await post(api, one.photo_id, report(one, FOUND))).status_code == status
    await admin.execute("select * from upload_pipeline.begin_photo_deletion($1)", photo.photo_id)
    assert (await post(api, photo.photo_id, report(photo, FOUND))).status_code == 404


async def test_without_a_secret_nobody_can_sign(database: Any, tmp_path: Path, photo: WaitingPhoto) -> None:
    async with open_api(database, tmp_path) as api:
        for secret in ("", "anything"):
            assert (await post(api, photo.photo_id, report(photo, FOUND), secret=secret)).status_code == 404
