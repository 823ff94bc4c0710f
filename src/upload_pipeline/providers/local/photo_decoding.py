"""Decoding a photo as a whole, within a limit of pixels.

Whatever bytes follow the picture are not looked at: phones append films, second pictures and notes of their own.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Final

from PIL import Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.photo_types import JPEG
from upload_pipeline.providers.local.thumbnail import THUMBNAIL_PIXELS

_DAMAGED: Final = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What Pillow raises at a picture that is damaged; memory that runs out is none of them."""


PngImagePlugin.MAX_TEXT_CHUNK = 16 * 1024**2
"""Bytes that one text of a PNG may unpack to before the picture is refused: editors write long histories into them."""


def decoded_photo(path: Path, media_type: str, max_pixels: int) -> tuple[Image.Image, int, int]:
    """Decodes a photo; of several pictures in a file, the first.

    A JPEG is decoded at the smallest scale that is enough for a thumbnail. All its data pass through the decoder all
    the same, at a small part of the memory.

    Args:
        path: the file.
        media_type: JPEG or PNG, as its first bytes say.
        max_pixels: width times height, at most.

    Returns:
        The picture, and the width and height in pixels as stored.

    Raises:
        PipelineError: `IMAGE_TOO_LARGE`, `CORRUPT_IMAGE`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it leaves out
            return _decoded_jpeg(path, max_pixels) if media_type == JPEG else _decoded_png(path, max_pixels)
    except _DAMAGED as error:
        raise PipelineError(
            ErrorCode.CORRUPT_IMAGE,
            f"The photo is cut off or damaged: {error}. Open it, save it anew and send that.",
        ) from error


class _Jpeg(JpegImageFile):
    """A JPEG whatever it says of further pictures, and without a look into its EXIF, which may be damaged."""

    def _read_dpi_from_exif(self) -> None:
        pass


def _decoded_jpeg(path: Path, max_pixels: int) -> tuple[Image.Image, int, int]:
    image = _Jpeg(path)
    width, height = _check_pixels(image, max_pixels)
    image.draft(image.mode, (THUMBNAIL_PIXELS * 2, THUMBNAIL_PIXELS * 2))
    image.load()
    return image, width, height


def _decoded_png(path: Path, max_pixels: int) -> tuple[Image.Image, int, int]:
    with PngImageFile(path) as unchecked:
        _check_pixels(unchecked, max_pixels)
        unchecked.verify()  # the checksums, which decoding passes over
    image = PngImageFile(path)
    image.load()
    return image, *image.size


def _check_pixels(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height > max_pixels:
        raise PipelineError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"The picture has {width:,} x {height:,} pixels; {max_pixels:,} are allowed. Send a smaller one, or raise "
            "UPLOAD_PIPELINE_MAX_PHOTO_PIXELS.",
            {"width": width, "height": height, "limit": max_pixels},
        )
    return width, height
