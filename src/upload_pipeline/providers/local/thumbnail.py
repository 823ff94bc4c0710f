"""A small picture of a photo: upright, in sRGB, without a byte of metadata."""

from __future__ import annotations

import io
from typing import Final

from PIL import Image, ImageCms

THUMBNAIL_PIXELS: Final = 512
"""The longer side, at most; a smaller photo is not made larger."""
_QUALITY: Final = 80
_SIXTEEN_TO_EIGHT: Final = 1 / 257
"""65,535 becomes 255."""

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each orientation (CIPA DC-008, tag 0x0112) upright; Pillow turns counterclockwise."""


def thumbnail_of(image: Image.Image, orientation: int) -> bytes:
    """Makes the thumbnail as JPEG; the same picture gives the same bytes under the same Pillow.

    Args:
        image: decoded, of any mode that JPEG or PNG can have. It is used up.
        orientation: 1 to 8.
    """
    profile = image.info.get("icc_profile")
    small = _scalable(image)
    # Pillow cannot reduce sixteen bits before it scales them.
    gap = None if small.mode.startswith("I") else 2.0
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS, reducing_gap=gap)
    if orientation in _TURNS:
        small = small.transpose(_TURNS[orientation])
    small = _in_srgb(_on_white(_eight_bits(small)), profile)
    small.info.clear()  # Pillow would write a comment that it finds there
    written = io.BytesIO()
    small.save(written, "JPEG", quality=_QUALITY, optimize=True)
    return written.getvalue()


def _scalable(image: Image.Image) -> Image.Image:
    """In a mode that can be scaled smoothly, with its transparency as a channel."""
    if image.mode.startswith("I") and "transparency" in image.info:
        shade = Image.new(image.mode, (1, 1), image.info["transparency"])
        image = _eight_bits(image)
        image.info["transparency"] = _eight_bits(shade).getpixel((0, 0))
    if image.mode == "P" or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("L") if image.mode == "1" else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips where it converts sixteen bits to eight: every grey above 255 would be white."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda level: level * _SIXTEEN_TO_EIGHT).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA"):
        return image
    pixels = image.convert("RGBA")
    ground = Image.new("RGBA", pixels.size, "white")
    return Image.alpha_composite(ground, pixels).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """By the photo's colour profile where it has one that fits; without, the numbers are taken for sRGB."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None  # a damaged profile, or one for another kind of picture
        if converted is not None:
            return converted
    return image.convert("RGB")
