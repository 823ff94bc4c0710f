from __future__ import annotations

import io
import random
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from photo_files import PLACE, chunk, exif_of, jpeg, picture, png, with_chunk, with_segment
from PIL import Image, ImageCms, PngImagePlugin

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.photo_types import JPEG, PNG
from upload_pipeline.providers.local.gps_removal import bytes_behind, photo_without_place

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta exif:GPSLatitude="33,51.4S" exif:GPSLongitude="70,39W"/>'
EXIFTOOL = shutil.which("exiftool")
SECRET = b"GPS 33 51 24 S"


def noisy(width: int = 120, height: int = 80) -> Image.Image:
    """A picture whose coded data hold many bytes that look like markers."""
    return Image.frombytes("RGB", (width, height), random.Random(7).randbytes(width * height * 3))


def full_jpeg(**options: Any) -> bytes:
    whole = jpeg(noisy(), exif=exif_of(place=PLACE), xmp=XMP, icc_profile=PROFILE, comment=SECRET, **options)
    for marker in (0xE0, 0xE2, 0xE3, 0xE6, 0xED, 0xEE, 0xEF):
        whole = with_segment(whole, marker, b"MPF\x00" + SECRET)
    return whole


def full_png() -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Location", SECRET.decode())
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
    texts.add_text("Raw profile type exif", SECRET.decode(), zip=True)
    whole = png(noisy(), exif=exif_of(place=PLACE), icc_profile=PROFILE, pnginfo=texts, dpi=(72, 72))
    return with_chunk(whole, b"teSt", SECRET)


def pixels(content: bytes) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of further pictures that are listed badly
        with Image.open(io.BytesIO(content)) as image:
            return image.tobytes()


def infos(content: bytes) -> dict[Any, Any]:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return image.info


JPEGS = {
    "baseline": lambda: full_jpeg(),
    "progressive": lambda: full_jpeg(progressive=True),
    "restarts": lambda: full_jpeg(restart_marker_rows=1),
    "trailer": lambda: full_jpeg() + full_jpeg() + SECRET,
    "filled": lambda: full_jpeg().replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_loses_every_place_and_no_pixel(kind: str) -> None:
    whole = JPEGS[kind]()
    clean = photo_without_place(whole, JPEG)
    assert pixels(clean) == pixels(whole)
    assert SECRET not in clean
    assert b"GPS" not in clean
    left = infos(clean)
    assert "xmp" not in left
    assert left["icc_profile"] == PROFILE
    exif = Image.Exif()
    exif.load(left["exif"])
    assert (exif[271], exif.get_ifd(0x8825)) == ("Maker", {})
    assert photo_without_place(clean, JPEG) == clean


def test_a_png_loses_every_place_and_no_pixel() -> None:
    whole = full_png() + SECRET
    clean = photo_without_place(whole, PNG)
    assert pixels(clean) == pixels(whole)
    assert SECRET not in clean
    left = infos(clean)
    assert set(left) == {"icc_profile", "exif", "dpi"}
    exif = Image.Exif()
    exif.load(left["exif"])
    assert (exif[271], exif.get_ifd(0x8825)) == ("Maker", {})
    with Image.open(io.BytesIO(clean)) as image:
        image.verify()
    assert photo_without_place(clean, PNG) == clean


def test_a_second_block_of_exif_goes() -> None:
    first, second = exif_of(), exif_of(place=PLACE)
    two = with_segment(jpeg(exif=first), 0xE1, second)
    clean = photo_without_place(two, JPEG)
    assert clean.count(b"Exif\x00\x00") == 1
    assert photo_without_place(clean, JPEG) == clean
    twice = with_chunk(png(exif=second), b"eXIf", second[6:])
    assert photo_without_place(twice, PNG).count(b"eXIf") == 1


def test_exif_of_nothing_but_a_place_goes_as_a_whole() -> None:
    assert b"Exif" not in photo_without_place(jpeg(exif=exif_of({}, {}, PLACE)), JPEG)
    assert b"eXIf" not in photo_without_place(png(exif=exif_of({}, {}, PLACE)), PNG)


def test_frames_of_an_animation_stay() -> None:
    moving = png(picture(), save_all=True, append_images=[picture(mode="L").convert("RGB"), noisy(96, 64)])
    with Image.open(io.BytesIO(photo_without_place(moving, PNG))) as image:
        assert getattr(image, "n_frames", 1) == 3


def test_a_jpeg_that_is_cut_off_stays_so() -> None:
    whole = jpeg(noisy())
    with (
        Image.open(io.BytesIO(photo_without_place(whole[:-3000], JPEG))) as image,
        pytest.raises(OSError, match="trunc"),
    ):
        image.load()  # given an end, a decoder would fill up with grey


@pytest.mark.parametrize(
    ("content", "media_type", "behind"),
    [
        (jpeg(), JPEG, 0),
        (jpeg()[:-2], JPEG, 0),
        (jpeg() + jpeg(), JPEG, len(jpeg())),
        (jpeg() + b"<html>", JPEG, 6),
        (png(), PNG, 0),
        (png() + b"PK\x03\x04", PNG, 4),
    ],
)
def test_what_follows_a_picture_is_counted(content: bytes, media_type: str, behind: int) -> None:
    assert bytes_behind(content, media_type) == behind


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (png()[:-12], PNG),
        (b"\x89PNG\r\n\x1a\n", PNG),
        (jpeg()[:2] + b"\xff\xe1\xff\xff" + b"x" * 100, JPEG),
        (jpeg()[:2] + b"\xff\xe1\x00\x01" + b"x" * 100, JPEG),
    ],
)
def test_parts_that_run_over_the_end_are_refused(content: bytes, media_type: str) -> None:
    with pytest.raises(PipelineError) as caught:
        photo_without_place(content, media_type)
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


@given(st.lists(st.tuples(st.integers(2, 900), st.integers(0, 255)), max_size=6), st.booleans())
def test_damage_ends_in_a_copy_or_a_refusal(flips: list[tuple[int, int]], is_png: bool) -> None:
    media_type = PNG if is_png else JPEG
    damaged = bytearray(FULL[media_type])
    for at, value in flips:
        damaged[at] = value
    try:
        clean = photo_without_place(bytes(damaged), media_type)
    except PipelineError:
        return
    assert photo_without_place(clean, media_type) == clean


FULL = {JPEG: full_jpeg(), PNG: full_png() + chunk(b"tEXt", SECRET)}


@pytest.mark.skipif(EXIFTOOL is None, reason="exiftool (libimage-exiftool-perl) is not installed")
@pytest.mark.parametrize("media_type", [JPEG, PNG])
def test_exiftool_finds_no_place(media_type: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo"
    photo.write_bytes(FULL[media_type])
    command = [EXIFTOOL or "", "-a", "-G1", "-ee3", "-U", str(photo)]
    assert "GPS" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    photo.write_bytes(photo_without_place(FULL[media_type], media_type))
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Maker" in found
    assert not [line for line in found.splitlines() if "GPS" in line or "XMP" in line or "Location" in line]
