"""Photos made for tests: pictures whose corners can be told apart, with any EXIF, and files made to do harm."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.ExifTags import GPS, IFD, Base

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (240, 240, 240)
PLACE: Mapping[int, Any] = {
    GPS.GPSVersionID: b"\x02\x03\x00\x00",
    GPS.GPSLatitudeRef: "S",
    GPS.GPSLatitude: (33.0, 51.0, 24.84),
    GPS.GPSLongitudeRef: "W",
    GPS.GPSLongitude: (70.0, 39.0, 3.5),
    GPS.GPSAltitudeRef: b"\x01",
    GPS.GPSAltitude: 12.5,
    GPS.GPSTimeStamp: (10.0, 11.0, 12.0),
    GPS.GPSDateStamp: "2024:02:29",
}
IMAGE_TAGS: Mapping[int, Any] = {Base.Make: "Maker", Base.Model: "Model 5", Base.Software: "1.2", Base.Orientation: 1}
EXPOSURE_TAGS: Mapping[int, Any] = {
    Base.DateTimeOriginal: "2024:02:29 23:59:58",
    Base.OffsetTimeOriginal: "-03:30",
    Base.SubsecTimeOriginal: "250",
    Base.Flash: 25,
    Base.FocalLength: 4.25,
    Base.FocalLengthIn35mmFilm: 26,
    Base.ISOSpeedRatings: 400,
    Base.ExposureTime: 0.008,
    Base.FNumber: 1.8,
    Base.LensModel: "Lens 4.25mm f/1.8",
}


def picture(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    """Red above left, green above right, blue below left, white below right."""
    image = Image.new("RGB", (width, height), WHITE)
    half = (width // 2, height // 2)
    image.paste(RED, (0, 0, *half))
    image.paste(GREEN, (half[0], 0, width, half[1]))
    image.paste(BLUE, (0, half[1], half[0], height))
    return image.convert(mode)


def exif_of(
    image: Mapping[int, Any] = IMAGE_TAGS,
    exposure: Mapping[int, Any] = EXPOSURE_TAGS,
    place: Mapping[int, Any] | None = None,
) -> bytes:
    """A block as `info["exif"]` has it."""
    exif = Image.Exif()
    for tag, value in image.items():
        exif[tag] = value
    exif.get_ifd(IFD.Exif).update(exposure)
    if place is not None:
        exif.get_ifd(IFD.GPSInfo).update(place)
    return exif.tobytes()


def raw_exif(
    image: list[tuple[int, int, int, bytes]],
    exposure: list[tuple[int, int, int, bytes]] = (),  # type: ignore[assignment]
    place: list[tuple[int, int, int, bytes]] = (),  # type: ignore[assignment]
) -> bytes:
    """A block of entries (tag, type, count, value) as they are given, right or wrong, in big-endian order."""

    def directory(start: int, entries: list[tuple[int, int, int, bytes]]) -> bytes:
        table, values = struct.pack(">H", len(entries)), b""
        behind = start + 2 + len(entries) * 12 + 4
        for tag, kind, count, value in entries:
            table += struct.pack(">HHL", tag, kind, count)
            if len(value) <= 4:
                table += value.ljust(4, b"\x00")
            else:
                table += struct.pack(">L", behind + len(values))
                values += value
        return table + b"\x00" * 4 + values

    pointers = [(tag, 4, 1, b"\x00" * 4) for tag, part in ((IFD.Exif, exposure), (IFD.GPSInfo, place)) if part]
    start = 8 + len(directory(8, [*image, *pointers]))
    filled = list(image)
    tail = b""
    for tag, part in ((IFD.Exif, exposure), (IFD.GPSInfo, place)):
        if part:
            filled.append((tag, 4, 1, struct.pack(">L", start + len(tail))))
            tail += directory(start + len(tail), list(part))
    return b"Exif\x00\x00MM\x00*" + struct.pack(">L", 8) + directory(8, filled) + tail


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    written = io.BytesIO()
    (image or picture()).save(written, "JPEG", quality=90, **options)
    return written.getvalue()


def png(image: Image.Image | None = None, **options: Any) -> bytes:
    written = io.BytesIO()
    (image or picture()).save(written, "PNG", **options)
    return written.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def with_chunk(photo: bytes, kind: bytes, content: bytes, *, after: bytes = b"IHDR") -> bytes:
    """A PNG with one more chunk behind the first of a kind."""
    at = photo.index(after) - 4
    end = at + 12 + int.from_bytes(photo[at : at + 4], "big")
    return photo[:end] + chunk(kind, content) + photo[end:]


def with_segment(photo: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment behind its first marker."""
    return photo[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + photo[2:]


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that unpacks to a picture of a single colour."""
    packer = zlib.compressobj(9)
    row = b"\x00" * (width // 8 + 2)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">LLBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def corners(thumbnail: bytes) -> list[str]:
    """The colours of the corners, from above left clockwise."""
    with Image.open(io.BytesIO(thumbnail)) as image:
        found = image.convert("RGB")
    width, height = found.size
    x, y = width // 8, height // 8
    return [
        _named(found, *at) for at in ((x, y), (width - 1 - x, y), (width - 1 - x, height - 1 - y), (x, height - 1 - y))
    ]


def _named(image: Image.Image, x: int, y: int) -> str:
    pixel: Any = image.getpixel((x, y))
    colours = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    return min(colours, key=lambda name: sum(abs(a - b) for a, b in zip(colours[name], pixel, strict=True)))
