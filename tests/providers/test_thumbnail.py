from __future__ import annotations

import io
from typing import Any

import pytest
from photo_files import corners, exif_of, jpeg, picture, png
from PIL import Image, ImageCms

from upload_pipeline.providers.local.thumbnail import thumbnail_of

UPRIGHT = ["red", "green", "white", "blue"]


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, ["red", "green", "white", "blue"]),
        (2, ["green", "red", "blue", "white"]),
        (3, ["white", "blue", "red", "green"]),
        (4, ["blue", "white", "green", "red"]),
        (5, ["red", "blue", "white", "green"]),
        (6, ["blue", "red", "green", "white"]),
        (7, ["white", "green", "red", "blue"]),
        (8, ["green", "white", "blue", "red"]),
    ],
)
def test_every_orientation_is_made_upright(orientation: int, expected: list[str]) -> None:
    made = thumbnail_of(picture(96, 64), orientation)
    assert opened(made).size == ((96, 64) if orientation < 5 else (64, 96))
    assert corners(made) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [((96, 64), (96, 64)), ((2048, 1024), (512, 256)), ((700, 1400), (256, 512)), ((5000, 3), (512, 1))],
)
def test_the_longer_side_has_at_most_512_pixels(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert opened(thumbnail_of(picture(*size), 1)).size == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_pictures_of_every_colour_mode(mode: str) -> None:
    stored = jpeg(picture(mode=mode)) if mode == "CMYK" else png(picture(mode=mode))
    assert corners(thumbnail_of(opened(stored), 1)) == UPRIGHT


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_pictures(mode: str) -> None:
    image = Image.new("L", (1200, 800), 200).convert(mode)
    pixel: Any = opened(thumbnail_of(opened(png(image)), 1)).getpixel((5, 5))
    assert pixel[0] == pytest.approx(200 if mode != "1" else 255, abs=60 if mode == "1" else 2)


def test_sixteen_bits_keep_their_shades() -> None:
    deep = Image.new("I;16", (1200, 800), 65535 // 4)
    deep.paste(Image.new("I;16", (600, 800), 65535 * 3 // 4), (600, 0))
    made = opened(thumbnail_of(opened(png(deep)), 1))
    left: Any = made.getpixel((50, 50))
    right: Any = made.getpixel((450, 50))
    assert (left[0], right[0]) == (pytest.approx(64, abs=3), pytest.approx(191, abs=3))


def test_sixteen_bits_with_a_transparent_shade_keep_the_others() -> None:
    deep = Image.new("I;16", (40, 40), 65535 // 4)
    deep.paste(Image.new("I;16", (20, 40), 300), (20, 0))
    made = opened(thumbnail_of(opened(png(deep, transparency=300)), 1))
    shown: Any = made.getpixel((5, 20))
    assert shown[0] == pytest.approx(64, abs=3)
    assert made.getpixel((35, 20)) == (255, 255, 255)


def test_what_is_transparent_is_shown_on_white() -> None:
    clear = Image.new("RGBA", (40, 40), (10, 10, 10, 0))
    grey_key = png(Image.new("L", (40, 40), 7), transparency=7)
    for stored in (png(clear), grey_key):
        assert opened(thumbnail_of(opened(stored), 1)).getpixel((20, 20)) == (255, 255, 255)


def test_a_colour_profile_is_turned_into_srgb() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    wide = Image.new("RGB", (40, 40), (10, 200, 10))
    plain = thumbnail_of(opened(jpeg(wide)), 1)
    assert thumbnail_of(opened(jpeg(wide, icc_profile=lab)), 1) == plain  # does not fit: left alone
    assert thumbnail_of(opened(jpeg(wide, icc_profile=b"no profile")), 1) == plain
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    fitting = bytearray(grey)
    at = int.from_bytes(fitting[fitting.index(b"gXYZ") + 4 :][:4], "big")
    red = int.from_bytes(fitting[fitting.index(b"rXYZ") + 4 :][:4], "big")
    fitting[at : at + 20], fitting[red : red + 20] = fitting[red : red + 20], fitting[at : at + 20]
    pixel: Any = opened(thumbnail_of(opened(jpeg(wide, icc_profile=bytes(fitting))), 1)).getpixel((20, 20))
    assert pixel[0] > 150 > 60 > pixel[1]  # green by its numbers, red by its profile


def test_no_metadata_is_left() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stored = jpeg(exif=exif_of(), comment=b"at home", icc_profile=profile, xmp=b"<x:xmpmeta/>")
    made = thumbnail_of(opened(stored), 1)
    assert set(opened(made).info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert b"at home" not in made


def test_the_same_picture_gives_the_same_bytes() -> None:
    assert thumbnail_of(picture(), 6) == thumbnail_of(picture(), 6)
