"""EXIF written anew with what is known to tell no place: the tags of a list, byte for byte as the camera wrote them.

A list of what stays, not of what goes: notes of the camera's maker, titles, comments and small previews may hold a
place too, and so may bytes of the block that no directory points to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from PIL.ExifTags import IFD, Base

_HEADERS: Final = {b"II*\x00": "<", b"MM\x00*": ">"}
"""TIFF 6.0, section 2: byte order and version."""
_UNIT_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes of one value of each type (TIFF 6.0, section 2)."""
_INLINE_BYTES: Final = 4
_ENTRY: Final = 12
_LONG: Final = 4
_MAX_VALUE_BYTES: Final = 512
"""No tag of the lists needs more."""

_IMAGE_TAGS: Final = frozenset(
    {
        Base.Make,
        Base.Model,
        Base.Orientation,
        Base.XResolution,
        Base.YResolution,
        Base.ResolutionUnit,
        Base.Software,
        Base.DateTime,
        Base.YCbCrPositioning,
    }
)
_EXPOSURE_TAGS: Final = frozenset(
    {
        Base.ExposureTime,
        Base.FNumber,
        Base.ExposureProgram,
        Base.ISOSpeedRatings,
        Base.SensitivityType,
        Base.RecommendedExposureIndex,
        Base.ExifVersion,
        Base.DateTimeOriginal,
        Base.DateTimeDigitized,
        Base.OffsetTime,
        Base.OffsetTimeOriginal,
        Base.OffsetTimeDigitized,
        Base.ShutterSpeedValue,
        Base.ApertureValue,
        Base.BrightnessValue,
        Base.ExposureBiasValue,
        Base.MaxApertureValue,
        Base.SubjectDistance,
        Base.MeteringMode,
        Base.LightSource,
        Base.Flash,
        Base.FocalLength,
        Base.SubsecTime,
        Base.SubsecTimeOriginal,
        Base.SubsecTimeDigitized,
        Base.FlashPixVersion,
        Base.ColorSpace,
        Base.ExifImageWidth,
        Base.ExifImageHeight,
        Base.SensingMethod,
        Base.CustomRendered,
        Base.ExposureMode,
        Base.WhiteBalance,
        Base.DigitalZoomRatio,
        Base.FocalLengthIn35mmFilm,
        Base.SceneCaptureType,
        Base.GainControl,
        Base.Contrast,
        Base.Saturation,
        Base.Sharpness,
        Base.LensSpecification,
        Base.LensMake,
        Base.LensModel,
    }
)


@dataclass(frozen=True, slots=True)
class _Entry:
    tag: int
    kind: int
    count: int
    value: bytes


def exif_without_place(block: bytes) -> bytes | None:
    """The block with the tags of the lists; done twice, it gives the same bytes.

    Args:
        block: from its TIFF header on.

    Returns:
        The new block in the same byte order; None where nothing that is kept could be read.
    """
    order = _HEADERS.get(block[:4])
    if order is None or len(block) < 8:
        return None
    (first,) = struct.unpack_from(order + "L", block, 4)
    image = _entries(block, order, first, _IMAGE_TAGS | {IFD.Exif})
    exposure: list[_Entry] = []
    pointer = next((entry for entry in image if entry.tag == IFD.Exif), None)
    if pointer is not None:
        image.remove(pointer)
        if pointer.kind == _LONG and pointer.count == 1:
            exposure = _entries(block, order, struct.unpack(order + "L", pointer.value)[0], _EXPOSURE_TAGS)
    if not image and not exposure:
        return None
    return _written(order, block[:4], image, exposure)


def _entries(block: bytes, order: str, start: int, wanted: frozenset[int]) -> list[_Entry]:
    """The wanted entries of a directory that can be read, by tag; the first of each tag, as Pillow takes it."""
    if start + 2 > len(block):
        return []
    found: dict[int, _Entry] = {}
    (count,) = struct.unpack_from(order + "H", block, start)
    for at in range(start + 2, min(start + 2 + count * _ENTRY, len(block) - _ENTRY + 1), _ENTRY):
        tag, kind, values = struct.unpack_from(order + "HHL", block, at)
        size = _UNIT_BYTES.get(kind, 0) * values
        if tag not in wanted or tag in found or not 0 < size <= _MAX_VALUE_BYTES:
            continue
        begin = at + 8 if size <= _INLINE_BYTES else struct.unpack_from(order + "L", block, at + 8)[0]
        value = block[begin : begin + size]
        if len(value) == size:
            found[tag] = _Entry(tag, kind, values, value)
    return [found[tag] for tag in sorted(found)]


def _written(order: str, header: bytes, image: list[_Entry], exposure: list[_Entry]) -> bytes:
    if exposure:
        place = struct.pack(order + "L", 0)
        draft = _directory(order, 8, [*image, _Entry(IFD.Exif, _LONG, 1, place)])
        place = struct.pack(order + "L", 8 + len(draft))
        image = [*image, _Entry(IFD.Exif, _LONG, 1, place)]
    first = _directory(order, 8, image)
    second = _directory(order, 8 + len(first), exposure) if exposure else b""
    return header + struct.pack(order + "L", 8) + first + second


def _directory(order: str, start: int, entries: list[_Entry]) -> bytes:
    """A directory at an offset, with its values behind it and no other one to follow."""
    table = [struct.pack(order + "H", len(entries))]
    values = b""
    behind = start + 2 + len(entries) * _ENTRY + 4
    for entry in sorted(entries, key=lambda one: one.tag):
        head = struct.pack(order + "HHL", entry.tag, entry.kind, entry.count)
        if len(entry.value) <= _INLINE_BYTES:
            table.append(head + entry.value.ljust(_INLINE_BYTES, b"\x00"))
        else:
            table.append(head + struct.pack(order + "L", behind + len(values)))
            values += entry.value + b"\x00" * (len(entry.value) % 2)
    return b"".join(table) + struct.pack(order + "L", 0) + values
