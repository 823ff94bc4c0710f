"""The tasks of the guarded processes that read photos: read one, write one without its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upload_pipeline.photo_types import PNG, check_photo_type
from upload_pipeline.providers.local.exif import read_exif
from upload_pipeline.providers.local.gps_removal import bytes_behind, photo_without_place
from upload_pipeline.providers.local.photo_decoding import decoded_photo
from upload_pipeline.providers.local.thumbnail import thumbnail_of

_TURNED = 5
"""From this orientation on, width and height change places."""


def read_photo(arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Decodes a photo, reads its EXIF and makes its thumbnail.

    Args:
        arguments: `path`, `media_type` and `max_pixels`.

    Returns:
        `width` and `height` as displayed, `exif` and `warnings`, and the thumbnail as JPEG.
    """
    path, media_type = Path(arguments["path"]), arguments["media_type"]
    photo = path.read_bytes()
    check_photo_type(photo[:16], media_type)
    image, width, height = decoded_photo(path, media_type, arguments["max_pixels"])
    facts = read_exif(image.info.get("exif"))
    if facts.orientation >= _TURNED:
        width, height = height, width
    if facts.fields:
        facts.fields |= {"width": width, "height": height}
    frames = getattr(image, "n_frames", 1)
    if media_type == PNG and frames > 1:
        facts.warnings.append(f"The photo has {frames:,} frames; only the first was looked at.")
    behind = bytes_behind(photo, media_type)
    if behind:
        facts.warnings.append(f"{behind:,} bytes follow the picture in the file; they were not looked at.")
    found = {"width": width, "height": height, "exif": facts.fields, "warnings": facts.warnings}
    return found, thumbnail_of(image, facts.orientation)


def write_without_place(arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Writes a photo without what tells where it was taken.

    Args:
        arguments: `path`, `media_type`, and `target`, the file to write.
    """
    photo = Path(arguments["path"]).read_bytes()
    check_photo_type(photo[:16], arguments["media_type"])
    Path(arguments["target"]).write_bytes(photo_without_place(photo, arguments["media_type"]))
    return {}, b""
