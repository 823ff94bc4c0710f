"""A photo without the place where it was taken, its picture untouched bit by bit.

What stays is what it takes to show the picture as it is, and the EXIF that `exif_block` keeps. All else goes: GPS,
XMP, IPTC, notes of the maker, comments, previews, further pictures, and whatever follows the picture's end. Doing it
twice gives the same bytes.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.photo_types import JPEG, SIGNATURES
from upload_pipeline.providers.local.exif_block import exif_without_place

_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP1, _APP2, _APP14, _APP15 = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF
_CODED: Final = 0
"""Our own mark for the coded picture between a scan's header and the next marker."""
_STANDALONE: Final = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a length: TEM, RST0 to RST7, SOI (ITU-T T.81, table B.1)."""
_MARKER: Final = re.compile(rb"\xff(?=[\x01-\xcf\xd8-\xfe])")
"""A marker within coded data: `FF 00` is a byte of it, `FF D0` to `FF D7` restart it."""
_EXIF: Final = b"Exif\x00\x00"
_KEPT_APPS: Final = {_APP0: b"JFIF\x00", _APP2: b"ICC_PROFILE\x00", _APP14: b"Adobe"}
"""Segments of applications that say how the picture looks, by how they begin."""
_MAX_SEGMENT: Final = 65_533

_KEPT_CHUNKS: Final = frozenset(
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST pHYs sPLT acTL fcTL fdAT".split()
)
"""What a PNG needs to look as it does (PNG, third edition, section 11); texts, times and what is unknown go."""


class _Segment(NamedTuple):
    marker: int
    start: int
    end: int


def photo_without_place(photo: bytes, media_type: str) -> bytes:
    """Gives the photo without what tells, or may tell, where it was taken; one that is cut off stays so.

    Args:
        photo: the file.
        media_type: what it is, JPEG or PNG.

    Raises:
        PipelineError: `CORRUPT_IMAGE` where its parts cannot be told from one another.
    """
    return b"".join(_jpeg_parts(photo) if media_type == JPEG else _png_parts(photo))


def bytes_behind(photo: bytes, media_type: str) -> int:
    """How many bytes follow the picture's end.

    Raises:
        PipelineError: as `photo_without_place`.
    """
    end = 0
    for part in _segments(photo) if media_type == JPEG else _chunks(photo):
        end = part[2]
    return len(photo) - end


def _jpeg_parts(photo: bytes) -> Iterator[bytes]:
    segments = list(_segments(photo))
    exif = b"".join(photo[one.start + 10 : one.end] for one in segments if _is_exif(photo, one))
    kept = exif_without_place(exif)
    yield SIGNATURES[JPEG][:2]
    written = kept is None or len(kept) + len(_EXIF) > _MAX_SEGMENT
    for one in segments:
        if _is_exif(photo, one):
            if kept is not None and not written:
                content = _EXIF + kept
                yield struct.pack(">BBH", 0xFF, _APP1, len(content) + 2) + content
                written = True
        elif _is_kept(photo, one):
            yield photo[one.start : one.end]


def _is_exif(photo: bytes, one: _Segment) -> bool:
    return one.marker == _APP1 and photo.startswith(_EXIF, one.start + 4)


def _is_kept(photo: bytes, one: _Segment) -> bool:
    if _APP0 <= one.marker <= _APP15:
        begin = _KEPT_APPS.get(one.marker)
        return begin is not None and photo.startswith(begin, one.start + 4)
    return one.marker != _COM


def _segments(photo: bytes) -> Iterator[_Segment]:
    """A JPEG's segments after its first marker up to the end of its picture; what lies between them is left out.

    A decoder may be done before the end is marked. What it did not need is no part of the picture.
    """
    at = 2
    scanned = False
    while at < len(photo):
        at = photo.find(b"\xff", at)
        while 0 <= at < len(photo) - 1 and photo[at + 1] == 0xFF:
            at += 1
        if at < 0 or at + 1 >= len(photo):
            return
        marker = photo[at + 1]
        if marker == _EOI:
            yield _Segment(marker, at, at + 2)
            return
        if marker == 0 or marker in _STANDALONE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(photo[at + 2 : at + 4], "big")
        if end < at + 4 or end > len(photo):
            if scanned:
                return
            raise _broken("a segment is longer than the file")
        yield _Segment(marker, at, end)
        at = end
        if marker == _SOS:
            found = _MARKER.search(photo, at)
            end = found.start() if found else len(photo)
            yield _Segment(_CODED, at, end)
            at = end
            scanned = True


def _png_parts(photo: bytes) -> Iterator[bytes]:
    yield SIGNATURES["image/png"]
    exif_written = False
    for kind, start, end in _chunks(photo):
        if kind == b"eXIf" and not exif_written:
            kept = exif_without_place(photo[start + 8 : end - 4])
            if kept is not None:
                exif_written = True
                yield struct.pack(">L", len(kept)) + kind + kept + struct.pack(">L", zlib.crc32(kind + kept))
        elif kind in _KEPT_CHUNKS:
            yield photo[start:end]


def _chunks(photo: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = len(SIGNATURES["image/png"])
    while True:
        end = at + 12 + int.from_bytes(photo[at : at + 4], "big")
        if end > len(photo):
            raise _broken("a chunk is longer than the file")
        kind = photo[at + 4 : at + 8]
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end


def _broken(reason: str) -> PipelineError:
    return PipelineError(
        ErrorCode.CORRUPT_IMAGE, f"The photo is cut off or damaged: {reason}. Open it, save it anew and send that."
    )
