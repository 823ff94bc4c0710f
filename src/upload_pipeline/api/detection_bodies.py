"""Bodies of the callback by which a team's own model tells what a photo shows."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upload_pipeline.api.error_bodies import invalid_field
from upload_pipeline.providers.detection import (
    MAX_DETECTIONS,
    MAX_LABEL_CHARS,
    MAX_NOTE_CHARS,
    Detection,
    read_detections,
)
from upload_pipeline.stages import PhotoStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_ERROR_CHARS = 1000

_PHOTO = "0d5f9f5e-3f0b-4c8e-9a6b-1f2f7c1d2e3a"
_DETECTION: dict[str, Any] = {
    "type": "damage",
    "label": "cracked tile",
    "confidence": 0.87,
    "box": {"x": 0.41, "y": 0.2, "width": 0.18, "height": 0.12},
    "note": "Two cracks from edge to edge.",
}


class ReportedBox(BaseModel):
    """Where in the photo as it is shown, in shares of its width and height."""

    model_config = ConfigDict(extra="forbid")

    x: float = Field(ge=0, le=1, description="Of the left edge.")
    y: float = Field(ge=0, le=1, description="Of the upper edge.")
    width: float = Field(gt=0, le=1, description="With `x` at most 1.")
    height: float = Field(gt=0, le=1, description="With `y` at most 1.")


class ReportedDetection(BaseModel):
    """One thing that was found."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_DETECTION]})

    type: str = Field(description="One of the `detection_types` of the message.")
    label: str = Field(min_length=1, max_length=MAX_LABEL_CHARS)
    confidence: float = Field(ge=0, le=1)
    box: ReportedBox | None = Field(description="null: the whole photo.")
    note: str = Field(default="", max_length=MAX_NOTE_CHARS)


class DetectionReport(BaseModel):
    """A model's answer to a photo's message: `detections`, or an `error` that ends the photo's job as failed."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"photo_id": _PHOTO, "detections": [_DETECTION]},
                {"photo_id": _PHOTO, "error": "The photo is too dark."},
            ]
        },
    )

    photo_id: UUID = Field(description="Of the message, and of the path.")
    detections: list[ReportedDetection] | None = Field(default=None, max_length=MAX_DETECTIONS)
    error: str | None = Field(default=None, min_length=1, max_length=MAX_ERROR_CHARS)

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, told: Any) -> Any:
        if isinstance(told, dict) and len({"detections", "error"} & told.keys()) != 1:
            raise ValueError("it must have detections or an error, and not both")
        return told


class DetectionsTaken(BaseModel):
    """What became of an answer."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"photo_id": _PHOTO, "status": "completed", "repeated": False}]}
    )

    photo_id: UUID
    status: PhotoStatus = Field(description="The photo's, now: `completed`, or `failed` by an `error`.")
    repeated: bool = Field(description="Whether this answer was given before: then nothing has changed.")


class Answer(BaseModel):
    """A report that was read; it says the same however it was written."""

    detections: list[dict[str, Any]] | None
    error: str | None

    @property
    def sha256(self) -> str:
        """Of what it says."""
        return sha256(json.dumps([self.detections, self.error], sort_keys=True).encode()).hexdigest()


def read_report(raw: bytes, photo_id: UUID, types: Sequence[str]) -> Answer:
    """Reads a callback's body.

    Args:
        raw: as it came.
        photo_id: of the path.
        types: the photo's detection types.

    Raises:
        PipelineError: `INVALID_ARGUMENT`, naming the field.
    """
    try:
        told = json.loads(raw)
        report = DetectionReport.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise invalid_field(place, str(first["msg"])) from error
    except (ValueError, RecursionError) as error:
        raise invalid_field("body", "it is not JSON") from error
    if report.photo_id != photo_id:
        raise invalid_field("photo_id", "it is not the photo of this path")
    if report.error is not None:
        if "\0" in report.error or any("\ud800" <= sign <= "\udfff" for sign in report.error):
            raise invalid_field("error", "it has a character that cannot be stored")
        return Answer(detections=None, error=report.error)
    # the strict rules: models take "0.5" for a number
    found: tuple[Detection, ...] = read_detections(told.get("detections"), types)
    return Answer(detections=[one.as_json() for one in found], error=None)
