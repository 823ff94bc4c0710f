"""What a detector is: who looks for things in a photo, what it is asked and what it may answer.

A detector answers at once (a hosted vision model), later by a callback (a team's own model), or not at all (`none`).
Whatever an answer says is checked by `read_detections` before anybody stores it.

    where    coordinates are shares of the picture as it is shown: x from the left edge, y from the top, 0 to 1
    box      null where a detection is of the whole photo
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.provider_failures import ProviderError

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

DETECTORS: tuple[str, ...] = ("none", "openai", "webhook")
"""The names that `open_detector` knows: what the setting `DETECTOR` may be."""

MAX_DETECTIONS = 200
MAX_LABEL_CHARS = 100
MAX_NOTE_CHARS = 1000

_EDGE = 1e-6  # what rounding may put a box over the edge
_PLACES = 6


@dataclass(frozen=True, slots=True)
class Box:
    """Where in the photo, in shares of its width and height.

    Attributes:
        x: of the left edge.
        y: of the upper edge.
    """

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        for name in ("x", "y", "width", "height"):
            _check_share(f"box.{name}", getattr(self, name))
        if self.width == 0 or self.height == 0:
            raise ValueError("a box must have a width and a height above 0")
        if self.x + self.width > 1 + _EDGE or self.y + self.height > 1 + _EDGE:
            raise ValueError("a box must lie within the photo: x + width and y + height are at most 1")


@dataclass(frozen=True, slots=True)
class Detection:
    """One thing that was found.

    Attributes:
        type: the detection type that it answers; one of those asked for.
        label: what it is, in a few words.
        confidence: from 0 to 1.
        box: where; None for the whole photo.
        note: anything more; may be empty.
    """

    type: str
    label: str
    confidence: float
    box: Box | None
    note: str = ""

    def __post_init__(self) -> None:
        _check_text("type", self.type, 1, MAX_LABEL_CHARS)
        _check_text("label", self.label, 1, MAX_LABEL_CHARS)
        _check_text("note", self.note, 0, MAX_NOTE_CHARS)
        _check_share("confidence", self.confidence)

    def as_json(self) -> dict[str, Any]:
        """As it is stored and shown; numbers to six places."""
        told = asdict(self)
        told["confidence"] = round(self.confidence, _PLACES)
        if self.box is not None:
            told["box"] = {name: round(value, _PLACES) for name, value in asdict(self.box).items()}
        return told


@dataclass(frozen=True, slots=True)
class DetectionMessage:
    """The queue message of a photo: these four fields and no others.

    Attributes:
        s3_url: where the photo lies.
        priority: `low`, `normal` or `high`.
    """

    photo_id: UUID
    s3_url: str
    detection_types: tuple[str, ...]
    priority: str

    def body(self) -> bytes:
        """The message as it is sent: the same bytes each time."""
        told = {
            "photo_id": str(self.photo_id),
            "s3_url": self.s3_url,
            "detection_types": list(self.detection_types),
            "priority": self.priority,
        }
        return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class DetectionRequest:
    """A message and what a detector may need beside it.

    Attributes:
        delivery_id: the same for each delivery of a message until it was answered.
        attempt: which delivery this is, from 1.
        thumbnail: reads a small JPEG of the photo, upright and without metadata.
        photo_url: reads the photo for a while without credentials; empty where the store cannot sign.
    """

    message: DetectionMessage
    delivery_id: UUID
    attempt: int
    thumbnail: Callable[[], Awaitable[bytes]]
    photo_url: str = ""


@dataclass
class DetectionError(ProviderError):
    """A request that brought no detections.

    Attributes:
        broken: an answer came that cannot be used, and may have been paid for.
    """

    broken: bool = False


@dataclass(frozen=True, slots=True)
class Detected:
    """An answer.

    Attributes:
        detections: None where nobody has looked.
        tokens: as the provider counted them; None where it counts none, or did not say.
        headers: of the answer, names in small letters.
    """

    detections: tuple[Detection, ...] | None
    tokens: int | None = None
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class AnswerLater:
    """The message was taken; the answer comes by a callback, within so many seconds."""

    seconds: float


class Detector(Protocol):
    """Looks for things in photos; safe to share between the tasks of one event loop."""

    @property
    def name(self) -> str:
        """One of `DETECTORS`."""

    async def detect(self, request: DetectionRequest) -> Detected | AnswerLater:
        """Asks once, for at least one detection type.

        Raises:
            DetectionError: `DETECT_UNAVAILABLE`, `DETECT_QUOTA`, `DETECT_DENIED`, `DETECT_REJECTED`, `DETECT_FAILED`;
                its remedy says what helps.
            PipelineError: the thumbnail cannot be read.
        """

    async def close(self) -> None:
        """Lets go of connections. A second call does nothing."""


class NoDetector:
    """Detection is off: each photo is done without an answer."""

    name = "none"

    async def detect(self, request: DetectionRequest) -> Detected:
        """Looks at nothing."""
        del request
        return Detected(None)

    async def close(self) -> None:
        """Has nothing to let go of."""


def open_detector(settings: Settings) -> Detector:
    """Gives the detector that the settings name; nothing is called before it is first used.

    Raises:
        PipelineError: `SETTING_INVALID` where a setting or a package that it needs is missing.
    """
    if settings.detector == "openai":
        from upload_pipeline.providers.openai_detector import open_openai_detector

        return open_openai_detector(settings)
    if settings.detector == "webhook":
        from upload_pipeline.providers.webhook_detector import open_webhook_detector

        return open_webhook_detector(settings)
    return NoDetector()


def read_detections(value: Any, types: Sequence[str]) -> tuple[Detection, ...]:
    """Checks what somebody gave as a list of detections: its shape is closed, and each part is what it must be.

    Args:
        value: as JSON gives it.
        types: the detection types that were asked for.

    Raises:
        PipelineError: `INVALID_ARGUMENT`, naming the place of the first fault.
    """
    if not isinstance(value, list):
        raise _unfit("detections", "must be a list")
    if len(value) > MAX_DETECTIONS:
        raise _unfit("detections", f"must have at most {MAX_DETECTIONS} entries, not {len(value)}")
    return tuple(_read_one(f"detections[{place}]", one, types) for place, one in enumerate(value))


def _read_one(place: str, value: Any, types: Sequence[str]) -> Detection:
    fields = _closed(place, value, ("type", "label", "confidence", "box"), ("note",))
    if fields["type"] not in types:
        raise _unfit(f"{place}.type", f"must be one of those asked for: {', '.join(types) or 'none'}")
    try:
        box = fields["box"]
        where = None if box is None else Box(**_closed(f"{place}.box", box, ("x", "y", "width", "height"), ()))
        return Detection(fields["type"], fields["label"], fields["confidence"], where, fields.get("note", ""))
    except ValueError as error:
        raise _unfit(place, f"does not fit: {error}") from error


def _closed(place: str, value: Any, needed: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(needed) <= set(value) <= {*needed, *allowed}:
        raise _unfit(
            place, f"must be an object of {', '.join(needed)}{''.join(f' and perhaps {name}' for name in allowed)}"
        )
    return value


def _check_share(name: str, value: Any) -> None:
    # True and False are numbers to Python; NaN is neither above nor below anything
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1")


def _check_text(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, str) or not least <= len(value.strip()) or len(value) > most:
        raise ValueError(f"{name} must be a text of {least} to {most} characters")
    if "\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value):
        raise ValueError(f"{name} has a character that cannot be stored")


def _unfit(place: str, rule: str) -> PipelineError:
    return PipelineError(
        ErrorCode.INVALID_ARGUMENT, f"{place} {rule}.", {"fields": [{"field": place, "problem": rule}]}
    )
