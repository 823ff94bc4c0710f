"""The vision detector against the simulator: what it sends and gives, and each fault by its remedy."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from detection_requests import IMAGE, TYPES, a_request

from tests.simulators.openai_vision import KEY, Fault, VisionSimulator, findings_of
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.detection import DetectionError, open_detector
from upload_pipeline.providers.openai_detector import OpenAIDetector
from upload_pipeline.providers.provider_failures import Remedy
from upload_pipeline.settings import Settings


@pytest.fixture
async def simulator() -> AsyncIterator[VisionSimulator]:
    async with VisionSimulator() as simulator:
        yield simulator


@pytest.fixture
async def detector(simulator: VisionSimulator) -> AsyncIterator[OpenAIDetector]:
    detector = OpenAIDetector(api_key=KEY, base_url=simulator.url, model="gpt-4.1-mini", timeout=2.0)
    yield detector
    await detector.close()


def setting(**values: Any) -> Settings:
    return Settings(**{"detector": "openai", "openai_api_key": KEY, **values}, _env_file=None)


async def test_each_type_is_asked_for_and_its_findings_come_as_boxes(
    simulator: VisionSimulator, detector: OpenAIDetector
) -> None:
    answer = await detector.detect(a_request())
    assert answer.detections is not None
    for given, found in zip(answer.detections, findings_of(IMAGE, TYPES), strict=True):
        corners = found["box"]
        assert (given.type, given.label, given.confidence) == (found["type"], found["label"], found["confidence"])
        assert given.note == found["note"]
        if corners is None:
            assert given.box is None
        else:
            assert given.box is not None
            assert (given.box.x, given.box.y) == (corners["left"], corners["top"])
            assert (given.box.width, given.box.height) == pytest.approx((0.4, 0.3))
    assert answer.tokens == simulator.books.tokens > 0
    assert answer.headers is not None
    assert "x-ratelimit-limit-tokens" in answer.headers
    assert simulator.books.asked == [list(TYPES)]


async def test_what_is_reserved_is_no_less_than_what_is_counted(
    simulator: VisionSimulator, detector: OpenAIDetector
) -> None:
    for types in (TYPES, ("damage",), tuple(f"größe {number}" for number in range(40))):
        answer = await detector.detect(a_request(types=types))
        assert answer.tokens is not None
        assert answer.tokens <= detector.bound_tokens(types)


@pytest.mark.parametrize(
    ("fault", "code", "remedy", "broken"),
    [
        (Fault.RATE_LIMITED, "DETECT_UNAVAILABLE", Remedy.WAIT, False),
        (Fault.QUOTA, "DETECT_QUOTA", Remedy.PAUSE, False),
        (Fault.UNAUTHORISED, "DETECT_DENIED", Remedy.PAUSE, False),
        (Fault.SERVER_ERROR, "DETECT_UNAVAILABLE", Remedy.AGAIN, False),
        (Fault.HANG, "DETECT_UNAVAILABLE", Remedy.AGAIN, False),
        (Fault.DROPPED, "DETECT_UNAVAILABLE", Remedy.AGAIN, False),
        (Fault.REJECTED, "DETECT_REJECTED", Remedy.SPLIT, False),
        (Fault.REFUSAL, "DETECT_REJECTED", Remedy.SPLIT, False),
        (Fault.CONTENT_FILTER, "DETECT_REJECTED", Remedy.SPLIT, False),
        (Fault.LENGTH, "DETECT_FAILED", Remedy.SPLIT, False),
        (Fault.TRUNCATED, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
        (Fault.NOT_JSON, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
        (Fault.NESTED, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
        (Fault.OUTSIDE, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
        (Fault.NAN, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
        (Fault.OTHER_TYPE, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
        (Fault.EXTRA_FIELD, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
        (Fault.NO_CHOICE, "DETECT_UNAVAILABLE", Remedy.AGAIN, True),
    ],
)
async def test_each_fault_has_its_remedy_and_what_was_paid_is_told(
    simulator: VisionSimulator, detector: OpenAIDetector, fault: Fault, code: str, remedy: Remedy, *, broken: bool
) -> None:
    simulator.misbehave(fault)
    with pytest.raises(DetectionError) as caught:
        await detector.detect(a_request())
    error = caught.value
    assert (error.code, error.remedy, error.broken) == (code, remedy, broken)
    assert KEY not in str(error)
    if fault not in (Fault.DROPPED, Fault.TRUNCATED):
        assert (error.tokens or 0) == simulator.books.tokens
    assert (await detector.detect(a_request())).detections


async def test_an_answer_without_usage_is_a_good_one(simulator: VisionSimulator, detector: OpenAIDetector) -> None:
    simulator.misbehave(Fault.NO_USAGE)
    answer = await detector.detect(a_request())
    assert answer.detections
    assert answer.tokens is None


async def test_a_model_that_is_not_there_pauses(simulator: VisionSimulator) -> None:
    detector = OpenAIDetector(api_key=KEY, base_url=simulator.url, model="gpt-99")
    with pytest.raises(DetectionError) as caught:
        await detector.detect(a_request())
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.DETECT_DENIED, Remedy.PAUSE)
    assert "UPLOAD_PIPELINE_DETECTION_MODEL" in caught.value.message
    await detector.close()
    await detector.close()


async def test_a_server_that_is_away_is_named() -> None:
    detector = OpenAIDetector(api_key=KEY, base_url="http://127.0.0.1:9/v1", model="gpt-4.1-mini")
    with pytest.raises(DetectionError, match=r"127\.0\.0\.1:9/v1/? cannot be reached"):
        await detector.detect(a_request())
    await detector.close()


async def test_a_thumbnail_that_cannot_be_read_is_no_failure_of_the_detector(detector: OpenAIDetector) -> None:
    async def missing() -> bytes:
        raise PipelineError(ErrorCode.OBJECT_MISSING, "gone")

    with pytest.raises(PipelineError) as caught:
        await detector.detect(a_request(thumbnail=missing))
    assert caught.value.code is ErrorCode.OBJECT_MISSING


async def test_it_is_opened_by_its_settings() -> None:
    detector = open_detector(setting(detection_model="gpt-4o-mini"))
    assert isinstance(detector, OpenAIDetector)
    assert (detector.name, detector.api_model) == ("openai", "gpt-4o-mini")
    await detector.close()


@pytest.mark.parametrize("key", ["", "sk-a sk-b", "sk-a\nsk-b"])
def test_a_key_that_cannot_work_stops_the_start(key: str) -> None:
    with pytest.raises(PipelineError) as caught:
        open_detector(setting(openai_api_key=key))
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert caught.value.message.startswith("UPLOAD_PIPELINE_OPENAI_API_KEY")
    assert "sk-" not in caught.value.message


def test_a_missing_package_stops_the_start_and_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.machinery.PathFinder.find_spec

    def without_openai(name: str, *args: Any) -> Any:
        return None if name == "openai" else found(name, *args)

    monkeypatch.delitem(sys.modules, "openai", raising=False)
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", without_openai)
    with pytest.raises(PipelineError) as caught:
        open_detector(setting())
    assert caught.value.message.startswith("UPLOAD_PIPELINE_DETECTOR needs the package openai")
