"""Detection by real workers: each detector's answers, outages that nobody has to clean up after, turns, callbacks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from probe_world import FAST, until, until_true

from tests.api.live_service import LiveService, running_service, service_settings
from tests.detection_jobs import WaitingPhoto, add_project, add_waiting_photo, photo_of
from tests.simulators import detection_model
from tests.simulators.detection_model import DetectionModel
from tests.simulators.openai_vision import KEY, Fault, VisionSimulator, findings_of
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_workers import detection_desk
from upload_workers.process import running_worker

SECRET = "a secret that two services share, 32+"
USER = uuid4()
LONG = 60.0
"""Seconds; the first worker that asks a vision model loads its client, which takes some on a busy machine."""

StartWorker = Callable[..., AbstractAsyncContextManager[Any]]
AddPhoto = Callable[..., Any]


@pytest.fixture(autouse=True)
def brisk_desk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection_desk, "SHORTEST_DELAY", 0.2)
    monkeypatch.setattr(detection_desk, "LONGEST_DELAY", 0.4)


@pytest.fixture
async def retries_come_soon(admin: asyncpg.Connection) -> None:
    name = await admin.fetchval("select quote_ident(current_database())")
    await admin.execute(
        f"alter role upload_worker in database {name} set upload_pipeline.backoff_base = '10 milliseconds'"
    )


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(f"file://{tmp_path / 'storage'}")


@pytest.fixture
async def add_photo(admin: asyncpg.Connection, store: ObjectStore) -> AddPhoto:
    project = await add_project(admin, USER)

    async def add(**options: Any) -> WaitingPhoto:
        return await add_waiting_photo(admin, project, USER, store=store, **{"stage": "extracted", **options})

    return add


@pytest.fixture
def worker(database: Any, tmp_path: Path) -> StartWorker:
    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[None]:
        chosen: dict[str, Any] = {**FAST, "home": tmp_path, "database_url": database.worker_url, **settings}
        async with running_worker(load_settings(**chosen), database.worker_url):
            yield

    return start


@pytest.fixture
async def vision() -> AsyncIterator[VisionSimulator]:
    async with VisionSimulator() as simulator:
        yield simulator


def openai(vision: VisionSimulator, **changes: Any) -> dict[str, Any]:
    """Settings of a worker."""
    prices = {"openai/gpt-4.1-mini": {"tokens": 0.4}}
    return {
        "detector": "openai",
        "openai_api_key": KEY,
        "openai_base_url": vision.url,
        "prices": prices,
        "detection_timeout": 3.0,
        **changes,
    }


async def until_done(admin: asyncpg.Connection, *photos: WaitingPhoto, state: str = "done") -> list[Any]:
    """The photos once all their jobs are in a state."""

    async def there() -> list[Any] | None:
        rows = [await photo_of(admin, photo.photo_id) for photo in photos]
        return rows if all(row["state"] == state for row in rows) else None

    found: list[Any] = await until(there, f"jobs {state}", LONG)
    return found


async def event_codes(admin: asyncpg.Connection, job_id: UUID) -> list[str]:
    rows = await admin.fetch("select code from upload_pipeline.events where job_id = $1 order by event_id", job_id)
    return [row["code"] for row in rows]


# none


async def test_where_detection_is_off_a_photo_is_done_at_once_and_says_so(
    admin: asyncpg.Connection, worker: StartWorker, add_photo: AddPhoto
) -> None:
    photo = await add_photo()
    async with worker():
        (row,) = await until_done(admin, photo)
    assert (row["status"], row["detector"], row["detections"]) == ("completed", "none", None)
    assert row["warnings"] == ["Detection is off."]


# openai


async def test_what_the_model_finds_is_stored_with_what_it_cost(
    admin: asyncpg.Connection, worker: StartWorker, add_photo: AddPhoto, vision: VisionSimulator
) -> None:
    photos = [await add_photo(types=["damage", "material"]) for _ in range(3)]
    async with worker(**openai(vision)):
        rows = await until_done(admin, *photos)
    for photo, row in zip(photos, rows, strict=True):
        found = json.loads(row["detections"])
        assert [one["label"] for one in found] == [
            one["label"] for one in findings_of(photo.thumbnail, ["damage", "material"])
        ]
        assert (row["status"], row["detector"], row["warnings"]) == ("completed", "openai", [])
        results = json.loads(row["results"])
        assert (results["detector"], results["detections"]) == ("openai", 2)
        assert results["cost"]["requests"] == 1
        assert results["cost"]["usd"] > 0
    assert set(vision.books.paid.values()) == {1}
    told = await admin.fetchval("select sum(tokens)::bigint from upload_pipeline.usage_records")
    assert told == vision.books.tokens


async def test_a_photo_that_is_refused_fails_alone(
    admin: asyncpg.Connection, worker: StartWorker, add_photo: AddPhoto, vision: VisionSimulator
) -> None:
    good, bad, long = [await add_photo() for _ in range(3)]
    vision.poison[sha256(bad.thumbnail).hexdigest()] = Fault.REFUSAL
    vision.poison[sha256(long.thumbnail).hexdigest()] = Fault.LENGTH
    async with worker(**openai(vision)):
        await until_done(admin, good)
        refused, cut = await until_done(admin, bad, long, state="deadletter")
    assert (refused["status"], refused["error_code"], refused["retry_count"]) == ("failed", "DETECT_REJECTED", 0)
    assert (cut["error_code"], cut["retry_count"]) == ("DETECT_FAILED", 0)
    assert json.loads(refused["results"])["cost"]["requests"] == 1
    assert set(vision.books.paid.values()) == {1}


@pytest.mark.usefixtures("retries_come_soon")
async def test_an_answer_that_cannot_be_used_is_asked_for_again_as_retries_come(
    admin: asyncpg.Connection, worker: StartWorker, add_photo: AddPhoto, vision: VisionSimulator
) -> None:
    photo, broken = await add_photo(), await add_photo()
    vision.poison[sha256(broken.thumbnail).hexdigest()] = Fault.OUTSIDE
    vision.misbehave(Fault.NOT_JSON)
    async with worker(**openai(vision, worker_concurrency=1)):
        await until_done(admin, photo)
        (row,) = await until_done(admin, broken, state="deadletter")
    assert row["error_code"] == "DETECT_UNAVAILABLE"
    assert vision.books.paid[sha256(photo.thumbnail).hexdigest()] == 2
    assert vision.books.paid[sha256(broken.thumbnail).hexdigest()] == 4


async def test_an_outage_of_the_provider_fails_no_photo_and_needs_no_hand(
    admin: asyncpg.Connection, worker: StartWorker, add_photo: AddPhoto, vision: VisionSimulator
) -> None:
    await vision.__aexit__()
    early = [await add_photo() for _ in range(3)]
    async with worker(**openai(vision)):

        async def put_off() -> bool:
            rows = [await photo_of(admin, photo.photo_id) for photo in early]
            return all((row["stage"], row["state"]) == ("detecting", "retryable") for row in rows)

        await until(put_off, "photos put off", LONG)
        late = await add_photo()
        await vision.__aenter__()
        vision.misbehave(Fault.SERVER_ERROR, times=3)
        rows = await until_done(admin, *early, late)
    assert all((row["status"], row["retry_count"], row["error_code"]) == ("completed", 0, None) for row in rows)
    assert set(vision.books.paid.values()) == {1}


async def test_an_empty_account_pauses_with_one_alarm_and_goes_on_when_there_is_money(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    vision: VisionSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detection_desk, "PAUSE_SECONDS", 1.5)
    photos = [await add_photo() for _ in range(3)]
    vision.misbehave(Fault.QUOTA, times=1)
    async with worker(**openai(vision)):
        rows = await until_done(admin, *photos)
    assert all((row["status"], row["retry_count"]) == ("completed", 0) for row in rows)
    alarms = await admin.fetch("select payload from upload_pipeline.events where code = 'provider_paused'")
    assert [json.loads(alarm["payload"])["code"] for alarm in alarms] == ["DETECT_QUOTA"]


async def test_of_one_users_photos_those_of_high_priority_come_first(
    admin: asyncpg.Connection, worker: StartWorker, add_photo: AddPhoto, vision: VisionSimulator
) -> None:
    asked = ["low", "normal", "high", "low", "high", "normal"]
    photos = [await add_photo(priority=priority) for priority in asked]
    await admin.execute("update upload_pipeline.lanes set max_in_flight = 1")
    async with worker(**openai(vision, worker_concurrency=1)):
        await until_done(admin, *photos)
    order = list(vision.books.paid)
    wanted = [2, 4, 1, 5, 0, 3]
    assert order == [sha256(photos[place].thumbnail).hexdigest() for place in wanted]


# webhook


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(database.worker_url, tmp_path, detection_secret=SECRET)
    async with running_service(settings) as running:
        yield running


@pytest.fixture
async def model() -> AsyncIterator[DetectionModel]:
    async with DetectionModel(SECRET) as model:
        yield model


def webhook(model: DetectionModel, service: LiveService, **changes: Any) -> dict[str, Any]:
    """Settings of a worker."""
    return {
        "detector": "webhook",
        "detection_url": model.url,
        "detection_secret": SECRET,
        "api_public_url": service.url,
        "detection_timeout": 1.0,
        **changes,
    }


@pytest.mark.parametrize("fault", [None, "eager", "twice", "contradicts"])
async def test_a_models_callback_ends_the_job_once(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
    fault: str | None,
) -> None:
    if fault is not None:
        model.misbehave(fault)
    photo = await add_photo(types=["damage", "material"], priority="high")
    expected = {None: [200], "eager": [200], "twice": [200, 200], "contradicts": [200, 409]}[fault]
    async with worker(**webhook(model, service)):
        (row,) = await until_done(admin, photo)
        await until_true(lambda: len(model.books.callbacks) == len(expected), "callbacks")
    ((_, attempt, message),) = model.books.messages
    assert attempt == 1
    assert (message["photo_id"], message["detection_types"], message["priority"]) == (
        str(photo.photo_id),
        ["damage", "material"],
        "high",
    )
    assert message["s3_url"].endswith(f"/{photo.photo_id}.jpg")
    assert json.loads(row["detections"]) == detection_model.findings_of(str(photo.photo_id), ["damage", "material"])
    assert (row["status"], row["detector"], row["retry_count"]) == ("completed", "webhook", 0)
    assert [status for _, status in model.books.callbacks] == expected
    codes = await event_codes(admin, photo.job_id)
    assert codes.count("job_done") == 1
    assert "write_fenced" not in codes


async def test_a_model_reads_the_photo_by_the_url_that_came_with_its_message(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
) -> None:
    model.call_back = False
    await add_photo()
    async with worker(**webhook(model, service)):
        await until_true(lambda: model.books.headers, "a message")
    url = model.books.headers["X-Upload-Pipeline-Photo"]
    assert url.startswith(f"{service.url}/api/v1/photos/")


@pytest.mark.usefixtures("retries_come_soon")
async def test_a_model_that_does_not_call_back_is_sent_the_same_message_again(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
) -> None:
    model.misbehave("silent", times=2)
    photo = await add_photo()
    async with worker(**webhook(model, service, detection_callback_seconds=0.4)):
        (row,) = await until_done(admin, photo)
    assert row["status"] == "completed"
    assert [attempt for _, attempt, _ in model.books.messages] == [1, 2, 3]
    assert len({delivery for delivery, _, _ in model.books.messages}) == 1


async def test_a_message_that_nobody_knows_to_be_taken_is_sent_again_under_the_same_id(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
) -> None:
    for fault in ("hang", "server_error"):
        model.misbehave(fault)
    photo = await add_photo()
    async with worker(**webhook(model, service, detection_timeout=0.5)):
        (row,) = await until_done(admin, photo)
    assert (row["status"], row["retry_count"]) == ("completed", 0)
    assert len(model.books.messages) == 3
    assert len({delivery for delivery, _, _ in model.books.messages}) == 1


@pytest.mark.usefixtures("retries_come_soon")
async def test_a_model_that_never_calls_back_ends_in_a_dead_letter_that_a_late_answer_still_ends(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
) -> None:
    model.call_back = False
    photo = await add_photo()
    async with worker(**webhook(model, service, detection_callback_seconds=0.3)):
        (row,) = await until_done(admin, photo, state="deadletter")
    assert (row["status"], row["error_code"]) == ("failed", "DETECT_TIMEOUT")
    assert [attempt for _, attempt, _ in model.books.messages] == [1, 2, 3, 4]
    await model.answer_all()
    assert [status for _, status in model.books.callbacks] == [200, 200, 200, 200]
    row = await photo_of(admin, photo.photo_id)
    assert (row["status"], row["state"], row["error_code"]) == ("completed", "done", None)


@pytest.mark.usefixtures("retries_come_soon")
@pytest.mark.parametrize(("fault", "status"), [("forged", 401), ("stale", 401), ("outside", 400)])
async def test_a_callback_that_is_refused_changes_nothing_and_the_next_one_counts(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
    fault: str,
    status: int,
) -> None:
    model.misbehave(fault)
    photo = await add_photo()
    async with worker(**webhook(model, service, detection_callback_seconds=0.5)):
        (row,) = await until_done(admin, photo)
        await until_true(lambda: len(model.books.callbacks) == 2, "callbacks")
    assert row["status"] == "completed"
    assert [told for _, told in model.books.callbacks] == [status, 200]


async def test_a_models_own_error_and_its_refusal_fail_the_photo_with_its_words(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
) -> None:
    first, second = await add_photo(), await add_photo()
    model.misbehave("error")
    model.misbehave("rejected")
    async with worker(**webhook(model, service, worker_concurrency=1)):
        rows = await until_done(admin, first, second, state="deadletter")
    assert [(row["error_code"], row["retry_count"]) for row in rows] == [("DETECT_FAILED", 0), ("DETECT_REJECTED", 0)]
    assert rows[0]["error_message"] == "The photo is too dark."
    assert "no such photo" in rows[1]["error_message"]


async def test_an_outage_of_the_model_fails_no_photo_and_needs_no_hand(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
) -> None:
    await model.__aexit__()
    photos = [await add_photo() for _ in range(3)]
    async with worker(**webhook(model, service)):

        async def put_off() -> bool:
            rows = [await photo_of(admin, photo.photo_id) for photo in photos]
            return all((row["stage"], row["state"]) == ("detecting", "retryable") for row in rows)

        await until(put_off, "photos put off", LONG)
        await model.__aenter__()
        for fault in ("server_error", "busy", "hang", "redirect"):
            model.misbehave(fault)
        rows = await until_done(admin, *photos)
    assert all((row["status"], row["retry_count"]) == ("completed", 0) for row in rows)
    assert {status for _, status in model.books.callbacks} == {200}


async def test_a_photo_that_was_started_again_after_an_error_is_a_message_of_its_own(
    admin: asyncpg.Connection,
    worker: StartWorker,
    add_photo: AddPhoto,
    service: LiveService,
    model: DetectionModel,
) -> None:
    photo = await add_photo()
    model.misbehave("error")
    async with worker(**webhook(model, service)):
        await until_done(admin, photo, state="deadletter")
        await admin.execute("select from upload_pipeline.retry_job($1)", photo.job_id)
        (row,) = await until_done(admin, photo)
    assert row["status"] == "completed"
    assert [attempt for _, attempt, _ in model.books.messages] == [1, 1]
    assert len({delivery for delivery, _, _ in model.books.messages}) == 2
