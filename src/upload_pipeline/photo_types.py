"""What a photo may be: the two formats, and how each is told by its first bytes."""

from __future__ import annotations

from typing import Final

JPEG: Final = "image/jpeg"
PNG: Final = "image/png"

PHOTO_EXTENSIONS: Final = {JPEG: "jpg", PNG: "png"}
"""The media types of photos, and how the key of such a photo ends."""

MIN_PHOTO_BYTES: Final = 1024
"""A smaller file is no photo."""

SIGNATURES: Final = {JPEG: b"\xff\xd8\xff", PNG: b"\x89PNG\r\n\x1a\n"}
"""How files begin: ITU-T T.81 B.1.1.3 (SOI, then any marker), PNG (third edition) section 5.2."""


def photo_type_of(head: bytes) -> str | None:
    """The media type of a file by its first eight bytes or more; None where it is no photo."""
    return next((media_type for media_type, start in SIGNATURES.items() if head.startswith(start)), None)
