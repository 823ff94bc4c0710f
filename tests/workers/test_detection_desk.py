"""The desk against the simulators and a real budget: what is asked and recorded, and what each fault does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.simulators.detection_model import DetectionModel
from tests.simulators.openai_vision import KEY, Fault, VisionSimulator
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.queue import ClaimedJob, Lease
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.detection import AnswerLater, Detected, DetectionMessage, DetectionRequest, Detector
from upload_pipeline.providers.openai_detector import OpenAIDetector
from upload_pipeline.providers.webhook_detector import WebhookDetector
from upload_workers import detection_desk
from upload_workers.detection_desk import DetectionDesk, NotNow

SECRET = "a secret that two services share, 32+"
MODEL = "gpt-4.1-mini"
PRICES = {f"openai/{MODEL}": {"tokens": 0.4}}

OpenDesk = Callable[..., DetectionDesk]


@pytest.fixture
async def db(database: Any) -> AsyncIterator[Any]:
    pool = await open_pool(database.worker_url, size=5)
    yield pool
    await pool.close()


@pytest.fixture
async def simulator() -> AsyncIterator[VisionSimulator]:
    async with VisionSimulator() as simulator:
        yield simulator


@pytest.fixture
async def open_desk(db: Any) -> AsyncIterator[OpenDesk]:
    """Desks that are closed at the end, twice."""
    opened: list[DetectionDesk] = []

    def open_one(simulator: VisionSimulator, detector: Detector | None = None, **options: Any) -> DetectionDesk:
        asked = OpenAIDetector(api_key=KEY, base_url=simulator.url, model=MODEL, max_tokens=500, timeout=2.0)
        given: dict[str, Any] = {
            "concurrency": 4,
            "timeout": 2.0,
            "patience": timedelta(hours=1),
            "prices": PRICES,
            **options,
        }
        opened.append(DetectionDesk(detector or asked, db, ProviderCalls(), **given))
        return opened[-1]

    yield open_one
    for desk in opened:
        await desk.close()
        await desk.close()


@pytest.fixture
def desk(simulator: VisionSimulator, open_desk: OpenDesk) -> DetectionDesk:
    return open_desk(simulator)


def a_job() -> ClaimedJob:
    return ClaimedJob(Lease(uuid4(), 1), uuid4(), uuid4(), "photo", "detecting", 0, "")


async def ask(
    desk: DetectionDesk,
    *,
    job: ClaimedJob | None = None,
    waited: float = 0.0,
    photo: UUID | None = None,
    types: tuple[str, ...] = ("damage",),
    thumbnail: Callable[[], Awaitable[bytes]] | None = None,
) -> Detected | AnswerLater | NotNow:
    async def small() -> bytes:
        return b"\xff\xd8\xff\xe0" + (photo or uuid4()).bytes

    message = DetectionMessage(photo or uuid4(), "s3://photos/1.jpg", types, "normal")
    request = DetectionRequest(message, delivery_id=uuid4(), attempt=1, thumbnail=thumbnail or small)
    return await desk.ask(job or a_job(), request, waited=timedelta(seconds=waited))


async def alarms(admin: asyncpg.Connection) -> list[str]:
    rows = await admin.fetch(
        "select payload ->> 'code' as code from upload_pipeline.events where code = 'provider_paused'"
    )
    return [row["code"] for row in rows]


async def test_what_an_answer_cost_is_recorded_for_its_job_at_todays_price(
    simulator: VisionSimulator, desk: DetectionDesk, admin: asyncpg.Connection
) -> None:
    job = a_job()
    answer = await ask(desk, job=job)
    assert isinstance(answer, Detected)
    (row,) = await admin.fetch("select * from upload_pipeline.usage_records")
    assert (row["job_id"], row["operation"], row["requests"]) == (job.job_id, "detect", 1)
    assert row["tokens"] == simulator.books.tokens == answer.tokens
    assert float(row["cost_micros"]) == pytest.approx(simulator.books.tokens * 0.4)
    budget = await admin.fetchrow("select calls, tokens, model from upload_pipeline.provider_budgets")
    assert tuple(budget) == (1, simulator.books.tokens, MODEL)


async def test_where_nothing_is_looked_for_nobody_is_asked(simulator: VisionSimulator, desk: DetectionDesk) -> None:
    assert await ask(desk, types=()) == Detected(())
    assert simulator.books.requests == 0


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.REFUSAL, ErrorCode.DETECT_REJECTED),
        (Fault.LENGTH, ErrorCode.DETECT_FAILED),
        (Fault.NOT_JSON, ErrorCode.DETECT_UNAVAILABLE),
        (Fault.REJECTED, ErrorCode.DETECT_REJECTED),
    ],
)
async def test_a_photos_own_failure_is_its_own_and_what_it_cost_is_in_the_books(
    simulator: VisionSimulator, desk: DetectionDesk, admin: asyncpg.Connection, fault: Fault, code: ErrorCode
) -> None:
    simulator.misbehave(fault)
    with pytest.raises(PipelineError) as caught:
        await ask(desk)
    assert caught.value.code is code
    assert caught.value.retryable == (fault is Fault.NOT_JSON)
    recorded = await admin.fetchval("select coalesce(sum(tokens), 0)::bigint from upload_pipeline.usage_records")
    assert recorded == simulator.books.tokens
    assert isinstance(await ask(desk), Detected)


@pytest.mark.parametrize("fault", [Fault.SERVER_ERROR, Fault.DROPPED])
async def test_an_outage_puts_photos_off_ever_longer_until_patience_ends(
    simulator: VisionSimulator, desk: DetectionDesk, fault: Fault
) -> None:
    simulator.misbehave(fault, times=3)
    soon = await ask(desk)
    later = await ask(desk, waited=100.0)
    assert isinstance(soon, NotNow)
    assert isinstance(later, NotNow)
    assert 3 <= soon.seconds <= 3.3
    assert 50 <= later.seconds <= 55
    with pytest.raises(PipelineError) as caught:
        await ask(desk, waited=3601.0)
    assert caught.value.code is ErrorCode.DETECT_UNAVAILABLE
    assert caught.value.retryable
    assert isinstance(await ask(desk, waited=3700.0), Detected)


async def test_a_limit_freezes_the_budget_of_all_workers_and_asks_nothing_meanwhile(
    simulator: VisionSimulator, desk: DetectionDesk, open_desk: OpenDesk
) -> None:
    simulator.misbehave(Fault.RATE_LIMITED, retry_after=300)
    put_off = await ask(desk)
    assert isinstance(put_off, NotNow)
    assert 290 < put_off.seconds < 335
    sent = simulator.books.requests
    began = time.monotonic()
    for one in (desk, open_desk(simulator)):
        put_off = await ask(one)
        assert isinstance(put_off, NotNow)
        assert 290 < put_off.seconds < 335
    assert simulator.books.requests == sent
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("fault", "code"), [(Fault.QUOTA, "DETECT_QUOTA"), (Fault.UNAUTHORISED, "DETECT_DENIED")])
async def test_an_empty_account_pauses_all_workers_with_one_alarm(
    simulator: VisionSimulator,
    desk: DetectionDesk,
    open_desk: OpenDesk,
    admin: asyncpg.Connection,
    fault: Fault,
    code: str,
) -> None:
    beside = open_desk(simulator)
    await ask(desk)
    simulator.misbehave(fault, times=100)
    told = await asyncio.gather(*(ask(one) for _ in range(5) for one in (desk, beside)))
    assert all(isinstance(answer, NotNow) and 590 < answer.seconds < 665 for answer in told)
    assert await alarms(admin) == [code]
    sent = simulator.books.requests
    third = await ask(open_desk(simulator))
    assert isinstance(third, NotNow)
    assert simulator.books.requests == sent


async def test_limits_of_a_minute_are_never_exceeded_by_workers_together(open_desk: OpenDesk) -> None:
    async with VisionSimulator(requests_per_minute=5, tokens_per_minute=50_000) as simulator:
        desks = [open_desk(simulator) for _ in range(3)]
        told = await asyncio.gather(*(ask(one) for _ in range(4) for one in desks))
        assert simulator.books.over_limit == 0
        assert sum(isinstance(answer, Detected) for answer in told) == simulator.books.answered <= 5
        assert simulator.books.answered >= 2


async def test_a_photo_that_a_minute_does_not_hold_fails_and_says_so(
    simulator: VisionSimulator, open_desk: OpenDesk
) -> None:
    with pytest.raises(PipelineError) as caught:
        await ask(open_desk(simulator, token_limit=100))
    assert caught.value.code is ErrorCode.REQUEST_OVER_BUDGET
    assert simulator.books.requests == 0


async def test_a_photo_that_no_minute_holds_fails_also_where_only_the_refusal_says_so(open_desk: OpenDesk) -> None:
    async with VisionSimulator(tokens_per_minute=100, tells_too_large=True) as simulator:
        with pytest.raises(PipelineError) as caught:
            await ask(open_desk(simulator))
    assert caught.value.code is ErrorCode.REQUEST_OVER_BUDGET
    assert "100 tokens in a minute" in caught.value.message
    assert "UPLOAD_PIPELINE_DETECTION_DETAIL" in caught.value.message


async def test_a_thumbnail_is_read_before_anything_is_reserved(
    simulator: VisionSimulator, desk: DetectionDesk, admin: asyncpg.Connection
) -> None:
    reserved: list[int] = []

    async def missing() -> bytes:
        reserved.append(await admin.fetchval("select count(*) from upload_pipeline.provider_reservations"))
        raise PipelineError(ErrorCode.OBJECT_MISSING, "gone")

    for _ in range(2):
        with pytest.raises(PipelineError) as caught:
            await ask(desk, thumbnail=missing)
        assert caught.value.code is ErrorCode.OBJECT_MISSING
    assert reserved == [0, 0]
    assert simulator.books.requests == 0


async def test_no_more_requests_are_in_flight_than_allowed_and_who_waits_too_long_is_put_off(
    open_desk: OpenDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection_desk, "BUDGET_SECONDS", 0.5)
    async with VisionSimulator(latency=0.4) as simulator:
        desk = open_desk(simulator, concurrency=2)
        told = await asyncio.gather(*(ask(desk) for _ in range(8)))
        assert simulator.books.most_in_flight <= 2
        assert {type(answer) for answer in told} == {Detected, NotNow}


async def test_a_database_that_is_away_pays_nothing(simulator: VisionSimulator, desk: DetectionDesk) -> None:
    class Away:
        async def fetchrow(self, query: str, *args: Any) -> Any:
            raise ConnectionRefusedError

    desk.db = Away()  # type: ignore[assignment]
    with pytest.raises(ConnectionRefusedError):
        await ask(desk)
    assert simulator.books.requests == 0


async def test_a_models_server_is_asked_without_a_budget_and_its_refusals_are_the_same(
    simulator: VisionSimulator, open_desk: OpenDesk, admin: asyncpg.Connection
) -> None:
    async with DetectionModel(SECRET, call_back=False) as model:
        detector = WebhookDetector(url=model.url, secret=SECRET, public_url="http://localhost", callback_seconds=9.0)
        desk = open_desk(simulator, detector)
        assert desk.calls_back
        assert await ask(desk) == AnswerLater(9.0)
        model.misbehave("busy")
        busy = await ask(desk)
        assert isinstance(busy, NotNow)
        assert 1 <= busy.seconds <= 1.1
        model.misbehave("server_error")
        assert isinstance(await ask(desk), NotNow)
        model.misbehave("rejected")
        with pytest.raises(PipelineError) as caught:
            await ask(desk)
        assert caught.value.code is ErrorCode.DETECT_REJECTED
        assert await admin.fetchval("select count(*) from upload_pipeline.usage_records") == 0

        stranger = WebhookDetector(url=model.url, secret=SECRET + "x", public_url="http://localhost")
        strange = open_desk(simulator, stranger)
        for _ in range(3):
            assert isinstance(await ask(strange), NotNow)
        assert model.books.refused == 1
        assert await alarms(admin) == ["DETECT_DENIED"]
