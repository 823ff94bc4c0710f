"""What an answer of a detector may be: each field's rule, the closed shape, and what is stored of it."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.detection import (
    MAX_DETECTIONS,
    Box,
    Detected,
    DetectionMessage,
    NoDetector,
    open_detector,
    read_detections,
)
from upload_pipeline.settings import Settings

TYPES = ("damage", "material")
GOOD: dict[str, Any] = {
    "type": "damage",
    "label": "dent",
    "confidence": 0.75,
    "box": {"x": 0.1, "y": 0.2, "width": 0.3, "height": 0.4},
    "note": "near the door",
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def box(**changes: Any) -> dict[str, Any]:
    return changed(box={**GOOD["box"], **changes})


def test_a_good_answer_is_stored_as_it_came() -> None:
    (one, whole) = read_detections([GOOD, changed(type="material", box=None)], TYPES)
    assert one.as_json() == GOOD
    assert whole.box is None
    assert whole.as_json()["box"] is None
    assert read_detections([], TYPES) == ()
    del (bare := dict(GOOD))["note"]
    assert read_detections([bare], TYPES)[0].note == ""


def test_numbers_are_rounded_to_six_places_and_may_touch_the_edge() -> None:
    (one,) = read_detections([changed(confidence=1, box={"x": 0.7, "y": 0, "width": 0.1 + 0.2, "height": 1})], TYPES)
    assert one.as_json()["box"] == {"x": 0.7, "y": 0, "width": 0.3, "height": 1}


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({}, "detections"),
        (None, "detections"),
        ([GOOD] * (MAX_DETECTIONS + 1), "detections"),
        ([GOOD, 1], "detections[1]"),
        ([changed(severity=1)], "detections[0]"),
        ([{**GOOD, "box": [0, 0, 1, 1]}], "detections[0].box"),
        ([changed(box={"x": 0, "y": 0, "width": 1})], "detections[0].box"),
        ([changed(type="weather")], "detections[0].type"),
        ([changed(type=["damage"])], "detections[0].type"),
        ([changed(label="")], "detections[0]"),
        ([changed(label="  ")], "detections[0]"),
        ([changed(label="x" * 101)], "detections[0]"),
        ([changed(label=7)], "detections[0]"),
        ([changed(label="a\0b")], "detections[0]"),
        ([changed(note="\ud800")], "detections[0]"),
        ([changed(note=None)], "detections[0]"),
        ([changed(confidence=1.01)], "detections[0]"),
        ([changed(confidence=-0.1)], "detections[0]"),
        ([changed(confidence=float("nan"))], "detections[0]"),
        ([changed(confidence=float("inf"))], "detections[0]"),
        ([changed(confidence=10**400)], "detections[0]"),
        ([changed(confidence=True)], "detections[0]"),
        ([changed(confidence="0.5")], "detections[0]"),
        ([box(x=0.8)], "detections[0]"),
        ([box(height=0)], "detections[0]"),
        ([box(y=-0.1)], "detections[0]"),
        ([box(width=None)], "detections[0]"),
    ],
)
def test_what_does_not_fit_is_refused_and_its_place_named(value: Any, field: str) -> None:
    with pytest.raises(PipelineError) as caught:
        read_detections(value, TYPES)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.details["fields"][0]["field"] == field
    assert caught.value.message.startswith(field)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "x", "y"]), inner, max_size=5),
    max_leaves=20,
)


@given(json_values)
def test_no_json_value_is_more_than_refused(value: Any) -> None:
    try:
        read = read_detections([{**GOOD, **value}] if isinstance(value, dict) else value, TYPES)
    except PipelineError as error:
        if error.code is not ErrorCode.INVALID_ARGUMENT:
            raise
    else:
        json.dumps([one.as_json() for one in read], allow_nan=False).encode()


@given(*(st.floats(0, 1) for _ in range(4)))
def test_a_box_that_is_taken_lies_within_the_photo(x: float, y: float, width: float, height: float) -> None:
    try:
        made = Box(x, y, width, height)
    except ValueError:
        assert width == 0 or height == 0 or x + width > 1 or y + height > 1
    else:
        assert made.x + made.width <= 1.000_001
        assert made.y + made.height <= 1.000_001


def test_the_message_has_the_four_fields_of_the_contract_and_the_same_bytes_each_time() -> None:
    message = DetectionMessage(UUID(int=7), "s3://photos/ä.jpg", TYPES, "high")
    assert json.loads(message.body()) == {
        "photo_id": "00000000-0000-0000-0000-000000000007",
        "s3_url": "s3://photos/ä.jpg",
        "detection_types": ["damage", "material"],
        "priority": "high",
    }
    assert message.body() == DetectionMessage(UUID(int=7), "s3://photos/ä.jpg", TYPES, "high").body()


async def test_without_a_setting_detection_is_off() -> None:
    detector = open_detector(Settings(_env_file=None))
    assert isinstance(detector, NoDetector)
    assert detector.name == "none"
    assert await detector.detect(None) == Detected(None)  # type: ignore[arg-type]
    await detector.close()
