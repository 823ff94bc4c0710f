"""Names of the objects of photos: `{project_id}/{yyyy}/{mm}/{dd}/{photo_id}.{ext}`, and what stands beside it.

The day is the one of the announcement, in UTC. A photo's other keys are made of its raw key, so that whoever has the
row, or one key, has them all.
"""

from __future__ import annotations

import re
from datetime import date
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError

EXTENSIONS = {"image/jpeg": "jpg", "image/png": "png"}
"""The extension of each media type that a photo may have."""

_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_KEY = re.compile(rf"({_UUID})/(\d{{4}})/(\d{{2}})/(\d{{2}})/({_UUID})(\.thumbnail|\.shared)?\.(jpg|png)", re.ASCII)


class PhotoObject(StrEnum):
    """What an object of a photo holds."""

    RAW = "raw"
    THUMBNAIL = "thumbnail"
    SHARED = "shared"
    """The copy that is handed out where the project drops the place where photos were taken."""


class PhotoKey(NamedTuple):
    """A key that belongs to a photo, taken apart."""

    kind: PhotoObject
    project_id: UUID
    photo_id: UUID


def photo_key(project_id: UUID, day: date, photo_id: UUID, media_type: str) -> str:
    """Key of the bytes as they are uploaded.

    Raises:
        KeyError: for a media type that no photo has.
    """
    return f"{project_id}/{day:%Y/%m/%d}/{photo_id}.{EXTENSIONS[media_type]}"


def thumbnail_key(raw: str) -> str:
    """Key of the thumbnail, a JPEG, of the photo with this raw key.

    Raises:
        PipelineError: `INVALID_KEY` where the key is none that `photo_key` makes.
    """
    return f"{_stem(raw)}.thumbnail.jpg"


def shared_key(raw: str) -> str:
    """Key of the copy without a place, of the photo's own type.

    Raises:
        PipelineError: as `thumbnail_key`.
    """
    return f"{_stem(raw)}.shared.{raw.rpartition('.')[2]}"


def photo_keys(raw: str) -> tuple[str, ...]:
    """Every key that a photo's objects may have, the raw one first.

    Raises:
        PipelineError: as `thumbnail_key`.
    """
    return (raw, thumbnail_key(raw), shared_key(raw))


def parse_photo_key(key: str) -> PhotoKey | None:
    """Takes a photo's key apart; `None` for a key that the functions above would not make."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    project, year, month, day, photo, kind, extension = match.groups()
    try:
        date(int(year), int(month), int(day))
    except ValueError:
        return None
    if kind == ".thumbnail" and extension != "jpg":
        return None
    return PhotoKey(PhotoObject(kind[1:]) if kind else PhotoObject.RAW, UUID(project), UUID(photo))


def _stem(raw: str) -> str:
    parsed = parse_photo_key(raw)
    if parsed is None or parsed.kind is not PhotoObject.RAW:
        shown = ascii(raw[:100])
        raise PipelineError(
            ErrorCode.INVALID_KEY,
            f"The object key {shown} is not the raw key of a photo. Make keys with the functions of "
            "storage.photo_keys.",
            {"key": shown},
        )
    return raw.rpartition(".")[0]
