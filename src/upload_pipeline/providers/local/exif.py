"""What a photo's EXIF says, as fields with stable names.

EXIF is read by Pillow, each value made safe by `exif_values`; the tags and what they hold are those of CIPA DC-008
(Exif 3.0), section 4.6. A value that makes no sense is left out and warned of: a photo is never refused for it.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from PIL import ExifTags, Image

from upload_pipeline.providers.local.exif_values import (
    degrees_of,
    number_of,
    positive_of,
    text_of,
    time_of,
    whole_of,
)

_UNREADABLE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
)
"""What Pillow raises at EXIF that is damaged."""

NO_EXIF: Final = "The photo has no EXIF: camera, time and place are not known."
BROKEN_EXIF: Final = "The photo's EXIF is damaged and could not be read."

Base, GPS = ExifTags.Base, ExifTags.GPS
_Reader = Callable[[Any], Any]

_IMAGE_FIELDS: Final[tuple[tuple[str, int, _Reader], ...]] = (
    ("camera_make", Base.Make, text_of),
    ("camera_model", Base.Model, text_of),
    ("software", Base.Software, text_of),
)
_EXPOSURE_FIELDS: Final[tuple[tuple[str, int, _Reader], ...]] = (
    ("lens_model", Base.LensModel, text_of),
    ("focal_length_mm", Base.FocalLength, positive_of),
    ("focal_length_35mm", Base.FocalLengthIn35mmFilm, positive_of),
    ("iso", Base.ISOSpeedRatings, whole_of),
    ("exposure_time_s", Base.ExposureTime, positive_of),
    ("f_number", Base.FNumber, positive_of),
)
_TIMES: Final = (
    (Base.DateTimeOriginal, Base.SubsecTimeOriginal, Base.OffsetTimeOriginal),
    (Base.DateTimeDigitized, Base.SubsecTimeDigitized, Base.OffsetTimeDigitized),
)
"""When the picture was taken, or else when it was made digital; when the file was changed is neither."""


@dataclass(slots=True)
class ExifFacts:
    """What was read.

    Attributes:
        fields: by their stable names; empty where there is no EXIF, or none that could be read.
        orientation: 1 to 8, by which the stored picture is turned or mirrored for display; 1 where nothing is said.
        warnings: what a person should know, in sentences.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    orientation: int = 1
    warnings: list[str] = field(default_factory=list)


def read_exif(block: bytes | None) -> ExifFacts:
    """Reads a photo's EXIF.

    Args:
        block: the EXIF as Pillow keeps it in `info["exif"]`; None where there is none.
    """
    facts = ExifFacts()
    if not block:
        facts.warnings.append(NO_EXIF)
        return facts
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns where it leaves a damaged tag out
        try:
            exif.load(block)
            image = _tags(exif)
        except _UNREADABLE:
            facts.warnings.append(BROKEN_EXIF)
            return facts
        exposure = _directory(exif, ExifTags.IFD.Exif, facts)
        place = _directory(exif, ExifTags.IFD.GPSInfo, facts)
    if not image and not exposure and not place:
        facts.warnings.append(BROKEN_EXIF)
        return facts
    _take(facts, image, _IMAGE_FIELDS)
    _take(facts, exposure, _EXPOSURE_FIELDS)
    _take_time(facts, exposure)
    _take_orientation(facts, image)
    _take_flash(facts, exposure)
    _take_place(facts, place)
    return facts


def _tags(exif: Image.Exif) -> dict[int, Any]:
    """The first directory's values, those left out that Pillow cannot decode."""
    found: dict[int, Any] = {}
    for tag in list(exif):
        try:
            found[tag] = exif[tag]
        except _UNREADABLE:
            found[tag] = None  # there, and unreadable
    return found


def _directory(exif: Image.Exif, ifd: ExifTags.IFD, facts: ExifFacts) -> Mapping[int, Any]:
    try:
        return exif.get_ifd(ifd)
    except _UNREADABLE:
        facts.warnings.append(f"The photo's EXIF is damaged: its part {ifd.name} could not be read.")
        return {}


def _take(facts: ExifFacts, tags: Mapping[int, Any], wanted: tuple[tuple[str, int, _Reader], ...]) -> None:
    for name, tag, reader in wanted:
        if tag not in tags:
            continue
        value = reader(tags[tag])
        if value is not None:
            facts.fields[name] = value
        elif not _says_nothing(tags[tag]):
            facts.warnings.append(f"The photo's EXIF has a value for {name} that makes no sense; it is left out.")


def _says_nothing(value: Any) -> bool:
    """Whether a value is an empty text or the zero that stands for `unknown`, neither of which is damage."""
    if isinstance(value, (str, bytes)):
        return text_of(value) is None
    return number_of(value) == 0


def _take_time(facts: ExifFacts, tags: Mapping[int, Any]) -> None:
    for moment, fraction, offset in _TIMES:
        value = time_of(tags.get(moment), tags.get(fraction), tags.get(offset))
        if value is not None:
            facts.fields["captured_at"] = value
            return
    if any(text_of(tags.get(moment)) for moment, _, _ in _TIMES):
        facts.warnings.append("The photo's EXIF has a capture time that is none; it is left out.")


def _take_orientation(facts: ExifFacts, tags: Mapping[int, Any]) -> None:
    if Base.Orientation not in tags:
        return
    value = whole_of(tags[Base.Orientation])
    if value is not None and 1 <= value <= 8:
        facts.fields["orientation"] = facts.orientation = value
    else:
        facts.warnings.append("The photo's EXIF has an orientation that is none; it is shown as it is stored.")


def _take_flash(facts: ExifFacts, tags: Mapping[int, Any]) -> None:
    value = whole_of(tags.get(Base.Flash))
    if value is not None:
        facts.fields["flash"] = {"fired": bool(value & 1), "raw": value}


def _take_place(facts: ExifFacts, tags: Mapping[int, Any]) -> None:
    latitude = degrees_of(tags.get(GPS.GPSLatitude), tags.get(GPS.GPSLatitudeRef), positive="N", negative="S", limit=90)
    longitude = degrees_of(
        tags.get(GPS.GPSLongitude), tags.get(GPS.GPSLongitudeRef), positive="E", negative="W", limit=180
    )
    if latitude is None or longitude is None:
        if GPS.GPSLatitude in tags or GPS.GPSLongitude in tags:
            facts.warnings.append("The photo's EXIF has a place that makes no sense; it is left out.")
        return
    place: dict[str, float] = {"latitude": latitude, "longitude": longitude}
    altitude = number_of(tags.get(GPS.GPSAltitude))
    if altitude is not None:
        below = _is_below(tags.get(GPS.GPSAltitudeRef))
        place["altitude_m"] = (-altitude if below else altitude) + 0.0  # never -0.0
    facts.fields["gps"] = place


def _is_below(reference: Any) -> bool:
    """1: below sea level; 3 (Exif 3.0): below the ellipsoid. Pillow gives the one byte as bytes."""
    value = reference[0] if isinstance(reference, bytes) and reference else reference
    return value in (1, 3)
