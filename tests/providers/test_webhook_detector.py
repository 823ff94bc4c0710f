"""The webhook detector against a model's server: what is sent, and each refusal by its remedy."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from detection_requests import PHOTO, a_request

from tests.simulators.detection_model import DetectionModel
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.detection import AnswerLater, DetectionError, open_detector
from upload_pipeline.providers.provider_failures import Remedy
from upload_pipeline.providers.webhook_detector import WebhookDetector
from upload_pipeline.settings import Settings, load_settings

SECRET = "a secret that two services share, 32+"


@pytest.fixture
async def model() -> AsyncIterator[DetectionModel]:
    async with DetectionModel(SECRET, call_back=False) as model:
        yield model


@pytest.fixture
async def detector(model: DetectionModel) -> AsyncIterator[WebhookDetector]:
    detector = WebhookDetector(
        url=model.url, secret=SECRET, public_url="https://api.example.com/", timeout=0.5, callback_seconds=90.0
    )
    yield detector
    await detector.close()
    await detector.close()


async def test_the_message_is_sent_exactly_and_signed_with_what_else_is_needed_in_headers(
    model: DetectionModel, detector: WebhookDetector
) -> None:
    request = a_request(attempt=3, photo_url="https://files.example.com/1.jpg?token=x")
    assert await detector.detect(request) == AnswerLater(90.0)
    ((delivery, attempt, message),) = model.books.messages
    assert (delivery, attempt, message) == (str(PHOTO), 3, json.loads(request.message.body()))
    assert model.books.refused == 0
    callback = f"https://api.example.com/api/v1/photos/{PHOTO}/detections"
    assert model.books.headers["X-Upload-Pipeline-Callback"] == callback
    assert model.books.headers["X-Upload-Pipeline-Photo"] == "https://files.example.com/1.jpg?token=x"
    assert model.books.headers["Content-Type"] == "application/json"
    await detector.detect(a_request())
    assert "X-Upload-Pipeline-Photo" not in model.books.headers


@pytest.mark.parametrize(
    ("fault", "code", "remedy"),
    [
        ("server_error", "DETECT_UNAVAILABLE", Remedy.AGAIN),
        ("hang", "DETECT_UNAVAILABLE", Remedy.AGAIN),
        ("redirect", "DETECT_UNAVAILABLE", Remedy.AGAIN),
        ("busy", "DETECT_UNAVAILABLE", Remedy.WAIT),
        ("rejected", "DETECT_REJECTED", Remedy.SPLIT),
    ],
)
async def test_each_refusal_has_its_remedy(
    model: DetectionModel, detector: WebhookDetector, fault: str, code: str, remedy: Remedy
) -> None:
    model.misbehave(fault)
    with pytest.raises(DetectionError) as caught:
        await detector.detect(a_request())
    assert (caught.value.code, caught.value.remedy) == (code, remedy)
    assert len(model.books.messages) == 1  # a redirect is not followed, and nothing is sent twice
    assert await detector.detect(a_request()) == AnswerLater(90.0)


async def test_a_busy_model_says_when_it_has_time_again(model: DetectionModel, detector: WebhookDetector) -> None:
    model.misbehave("busy")
    with pytest.raises(DetectionError) as caught:
        await detector.detect(a_request())
    limits = caught.value.limits()
    assert limits is not None
    assert limits.retry_after == 1


async def test_another_secret_is_found_out_and_names_the_settings(model: DetectionModel) -> None:
    detector = WebhookDetector(url=model.url, secret=SECRET + "x", public_url="http://localhost")
    with pytest.raises(DetectionError) as caught:
        await detector.detect(a_request())
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.DETECT_DENIED, Remedy.PAUSE)
    assert "UPLOAD_PIPELINE_DETECTION_URL" in caught.value.message
    assert (model.books.refused, model.books.messages) == (1, [])
    await detector.close()


async def test_a_model_that_is_away_can_come_back(model: DetectionModel, detector: WebhookDetector) -> None:
    await model.__aexit__()
    with pytest.raises(DetectionError) as caught:
        await detector.detect(a_request())
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.DETECT_UNAVAILABLE, Remedy.AGAIN)
    assert not caught.value.answered
    await model.__aenter__()
    assert await detector.detect(a_request()) == AnswerLater(90.0)


SETTINGS = {
    "detector": "webhook",
    "detection_url": "https://model.example.com/detect",
    "detection_secret": SECRET,
    "api_public_url": "https://api.example.com",
}


async def test_it_is_opened_by_its_settings() -> None:
    detector = open_detector(Settings(**SETTINGS, _env_file=None))
    assert isinstance(detector, WebhookDetector)
    assert (detector.name, detector.url, detector.secret) == ("webhook", "https://model.example.com/detect", SECRET)
    await detector.close()


@pytest.mark.parametrize("missing", ["detection_url", "detection_secret", "api_public_url"])
def test_a_setting_that_is_missing_stops_the_start_and_is_named(missing: str) -> None:
    given: dict[str, Any] = {**SETTINGS, missing: ""}
    with pytest.raises(PipelineError) as caught:
        open_detector(Settings(**given, _env_file=None))
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert caught.value.message.startswith(f"UPLOAD_PIPELINE_{missing.upper()} is empty")
    assert SECRET not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"detection_secret": "short"}, "detection_secret"),
        ({"detection_url": "file:///etc/passwd"}, "DETECTION_URL"),
        ({"detection_url": "https://user:pass@model.example.com"}, "DETECTION_URL"),
        ({"detector": "local"}, "DETECTOR"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(PipelineError, match=named):
        load_settings(**{**SETTINGS, **changes})
