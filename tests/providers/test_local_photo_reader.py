from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from photo_corpus import CORPUS, EXIFTOOL, by_exiftool, corpus_photos
from photo_files import PLACE, bomb, chunk, corners, exif_of, jpeg, picture, png, raw_exif, with_segment
from PIL import Image, PngImagePlugin

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.photo_types import JPEG, PNG
from upload_pipeline.providers.local.photo_tasks import read_photo
from upload_pipeline.providers.local_photo_reader import LocalPhotoReader
from upload_pipeline.providers.photo_reading import PhotoFacts, PhotoReader

MIB = 1024**2
MAX_PIXELS = 20_000_000
BOMB = bomb(30_000, 30_000)


@pytest.fixture(scope="module")
def reader() -> Iterator[PhotoReader]:
    made = LocalPhotoReader(timeout=30, memory_bytes=512 * MIB, max_pixels=MAX_PIXELS)
    yield made
    made.close()


async def read(reader: PhotoReader, folder: Path, content: bytes, media_type: str) -> PhotoFacts:
    path = folder / "photo"
    path.write_bytes(content)
    return await reader.read(path, media_type)


async def test_a_photo_gives_its_facts_and_a_thumbnail(reader: PhotoReader, tmp_path: Path) -> None:
    facts = await read(reader, tmp_path, jpeg(picture(1200, 800), exif=exif_of({274: 6}, place=PLACE)), JPEG)
    assert (facts.width, facts.height, facts.warnings) == (800, 1200, ())
    assert (facts.exif["width"], facts.exif["height"], facts.exif["orientation"]) == (800, 1200, 6)
    assert facts.exif["gps"]["latitude"] == -33.8569
    assert corners(facts.thumbnail) == ["blue", "red", "green", "white"]
    with Image.open(io.BytesIO(facts.thumbnail)) as image:
        assert (image.format, image.size) == ("JPEG", (341, 512))
    assert await read(reader, tmp_path, (tmp_path / "photo").read_bytes(), JPEG) == facts


async def test_a_png_with_exif_is_read_alike(reader: PhotoReader, tmp_path: Path) -> None:
    facts = await read(reader, tmp_path, png(exif=exif_of({271: "Maker", 274: 3}, place=PLACE)), PNG)
    assert (facts.exif["camera_make"], facts.exif["gps"]["altitude_m"]) == ("Maker", -12.5)
    assert corners(facts.thumbnail) == ["white", "blue", "red", "green"]


@pytest.mark.parametrize(
    ("content", "media_type", "warning"),
    [
        (jpeg(), JPEG, "no EXIF"),
        (png(), PNG, "no EXIF"),
        (jpeg(exif=exif_of()[:30]), JPEG, "EXIF is damaged"),
        (with_segment(jpeg(), 0xE1, b"Exif\x00\x00garbage"), JPEG, "EXIF is damaged"),
        (jpeg(exif=exif_of()) + b"PK\x03\x04<html>", JPEG, "10 bytes follow"),
        (png(exif=exif_of()) + b"<script>", PNG, "8 bytes follow"),
        (png(save_all=True, append_images=[picture(mode="L").convert("RGB")], exif=exif_of()), PNG, "2 frames"),
    ],
)
async def test_oddities_are_warnings(
    reader: PhotoReader, tmp_path: Path, content: bytes, media_type: str, warning: str
) -> None:
    facts = await read(reader, tmp_path, content, media_type)
    assert [warning in line for line in facts.warnings] == [True]
    assert (facts.width, facts.height) == (96, 64)
    assert facts.exif == {} or "camera_make" in facts.exif


async def test_long_texts_in_a_png_cost_nothing_and_endless_ones_the_photo(reader: PhotoReader, tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("history", "x" * 3_000_000, zip=True)
    assert (await read(reader, tmp_path, png(pnginfo=texts), PNG)).width == 96
    texts.add_text("more", "x" * 20_000_000, zip=True)
    with pytest.raises(PipelineError) as caught:
        await read(reader, tmp_path, png(pnginfo=texts), PNG)
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


async def test_a_resolution_that_is_none_costs_nothing(reader: PhotoReader, tmp_path: Path) -> None:
    exif = raw_exif([(282, 2, 1, b"\x00"), (296, 3, 1, b"\x00\x02"), (271, 2, 6, b"Maker\x00")])
    facts = await read(reader, tmp_path, jpeg(exif=exif), JPEG)
    assert (facts.exif["camera_make"], facts.warnings) == ("Maker", ())


async def test_further_pictures_of_a_phone_are_no_damage(reader: PhotoReader, tmp_path: Path) -> None:
    several = io.BytesIO()
    picture().save(several, "MPO", save_all=True, append_images=[picture(40, 40)], exif=exif_of())
    facts = await read(reader, tmp_path, several.getvalue(), JPEG)
    assert (facts.width, facts.exif["camera_make"]) == (96, "Maker")
    badly_listed = with_segment(jpeg(exif=exif_of()), 0xE2, b"MPF\x00nonsense")
    assert (await read(reader, tmp_path, badly_listed, JPEG)).warnings == ()


@pytest.mark.parametrize("declared", [JPEG, PNG])
@pytest.mark.parametrize(
    "content",
    [
        b"%PDF-1.7\n" + jpeg(),
        b"<html>" + png(),
        b"GIF89a" + b"\x00" * 2000,
        b"PK\x03\x04" + jpeg(),
        b"\x00" + jpeg(),
        b"",
    ],
)
async def test_what_does_not_begin_as_declared_is_refused(
    reader: PhotoReader, tmp_path: Path, content: bytes, declared: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        await read(reader, tmp_path, content, declared)
    assert caught.value.code is ErrorCode.TYPE_MISMATCH


async def test_a_jpeg_under_the_name_of_a_png_is_refused(reader: PhotoReader, tmp_path: Path) -> None:
    for content, declared in ((jpeg(), PNG), (png(), JPEG)):
        with pytest.raises(PipelineError) as caught:
            await read(reader, tmp_path, content, declared)
        assert caught.value.code is ErrorCode.TYPE_MISMATCH


def noise(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((300, 300), 80).convert(mode)


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (jpeg(noise())[:-3000], JPEG),
        (jpeg(noise(), progressive=True)[:-3000], JPEG),
        (jpeg(noise())[:200], JPEG),
        (jpeg()[:3] + b"\x00" * 2000, JPEG),
        (png(noise())[:-3000], PNG),
        (png(noise())[:-12], PNG),
        (png(noise()).replace(b"IDAT", b"IDAT\x00", 1), PNG),
        (png()[:8] + chunk(b"IHDR", b"\x00" * 13) + chunk(b"IEND", b""), PNG),
    ],
)
async def test_a_photo_that_is_cut_off_or_damaged_is_refused(
    reader: PhotoReader, tmp_path: Path, content: bytes, media_type: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        await read(reader, tmp_path, content, media_type)
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


@pytest.mark.parametrize("place", ["data", "checksum"])
async def test_a_png_with_a_flipped_bit_is_refused(reader: PhotoReader, tmp_path: Path, place: str) -> None:
    damaged = bytearray(png(noise()))
    damaged[-13 if place == "checksum" else len(damaged) // 2] ^= 1
    with pytest.raises(PipelineError) as caught:
        await read(reader, tmp_path, bytes(damaged), PNG)
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


async def test_a_bomb_is_refused_before_it_unpacks(reader: PhotoReader, tmp_path: Path) -> None:
    assert len(BOMB) < 200_000
    with pytest.raises(PipelineError) as caught:
        await read(reader, tmp_path, BOMB, PNG)
    assert caught.value.code is ErrorCode.IMAGE_TOO_LARGE
    assert caught.value.details == {"width": 30_000, "height": 30_000, "limit": MAX_PIXELS}
    huge = bytearray(jpeg())
    at = huge.index(b"\xff\xc0") + 5
    huge[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(PipelineError) as caught:
        await read(reader, tmp_path, bytes(huge), JPEG)
    assert caught.value.code is ErrorCode.IMAGE_TOO_LARGE


async def test_a_bomb_within_the_limit_of_pixels_ends_with_its_process_only(tmp_path: Path) -> None:
    reader = LocalPhotoReader(timeout=30, memory_bytes=128 * MIB, max_pixels=10**10)
    try:
        with pytest.raises(PipelineError) as caught:
            await read(reader, tmp_path, BOMB, PNG)
        assert caught.value.code is ErrorCode.PARSE_MEMORY
        assert (await read(reader, tmp_path, png(), PNG)).width == 96
    finally:
        reader.close()


async def test_a_photo_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    reader = LocalPhotoReader(timeout=0.3, memory_bytes=1024 * MIB, max_pixels=10**10)
    try:
        await read(reader, tmp_path, png(), PNG)
        with pytest.raises(PipelineError) as caught:
            await read(reader, tmp_path, BOMB, PNG)
        assert caught.value.code is ErrorCode.PARSE_TIMEOUT
    finally:
        reader.close()


async def test_the_copy_without_its_place_reads_as_before(reader: PhotoReader, tmp_path: Path) -> None:
    photo, copy, again = tmp_path / "photo", tmp_path / "copy", tmp_path / "again"
    for media_type, content in (
        (JPEG, jpeg(exif=exif_of(place=PLACE))),
        (PNG, png(exif=exif_of(place=PLACE))),
    ):
        photo.write_bytes(content)
        before = await reader.read(photo, media_type)
        await reader.write_without_place(photo, media_type, copy)
        await reader.write_without_place(copy, media_type, again)
        assert copy.read_bytes() == again.read_bytes()
        after = await reader.read(copy, media_type)
        assert before.exif.pop("gps")
        assert after == before


async def test_a_file_that_is_not_there(reader: PhotoReader, tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        await reader.read(tmp_path / "none", JPEG)
    assert caught.value.code is ErrorCode.FILE_NOT_FOUND


async def test_photos_are_read_side_by_side(reader: PhotoReader, tmp_path: Path) -> None:
    paths = [tmp_path / f"photo-{number}" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(png(picture(100 + number, 64)))
    found = await asyncio.gather(*(reader.read(path, PNG) for path in paths))
    assert [facts.width for facts in found] == [100 + number for number in range(6)]


WHOLE = jpeg(exif=exif_of({271: "Maker", 282: 72.0, 283: 72.0, 296: 2, 274: 6}, place=PLACE))
EXIF_AT, EXIF_END = WHOLE.index(b"Exif"), WHOLE.index(b"\xff\xdb")


@given(st.lists(st.tuples(st.integers(EXIF_AT + 6, EXIF_END - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damage_in_exif_never_costs_the_photo(flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(WHOLE)
    for at, value in flips:
        damaged[at] = value
    DAMAGED.write_bytes(bytes(damaged))
    header, thumbnail = read_photo({"path": str(DAMAGED), "media_type": JPEG, "max_pixels": MAX_PIXELS})
    json.dumps(header, allow_nan=False)
    assert sorted((header["width"], header["height"])) == [64, 96]
    assert thumbnail


@pytest.fixture(scope="module", autouse=True)
def damaged_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    global DAMAGED
    DAMAGED = tmp_path_factory.mktemp("damaged") / "photo.jpg"


DAMAGED = Path()


@pytest.mark.skipif(not corpus_photos(), reason="the corpus (../shared/corpus) is not here")
@pytest.mark.parametrize("row", corpus_photos(), ids=lambda row: row["path"])
async def test_the_corpus_ends_as_its_manifest_says(reader: PhotoReader, row: dict[str, str]) -> None:
    path = CORPUS / row["path"]
    verdict, _, code = row["expected"].partition(" ")
    if code == ErrorCode.FILE_TOO_SMALL:
        assert path.stat().st_size < 1024  # refused when it is announced
        return
    reading = reader.read(path, PNG if path.suffix == ".png" else JPEG)
    if verdict == "accept":
        assert (await reading).thumbnail
        return
    with pytest.raises(PipelineError) as caught:
        await reading
    assert caught.value.code == code


@pytest.mark.skipif(not corpus_photos(), reason="the corpus (../shared/corpus) is not here")
@pytest.mark.skipif(EXIFTOOL is None, reason="exiftool (libimage-exiftool-perl) is not installed")
@pytest.mark.parametrize("name", [row["path"] for row in corpus_photos() if row["expected"] == "accept"])
async def test_exiftool_reads_the_same_off_the_corpus(reader: PhotoReader, name: str) -> None:
    path = CORPUS / name
    facts = await reader.read(path, PNG if path.suffix == ".png" else JPEG)
    expected = by_exiftool(path)
    assert set(facts.exif) == set(expected)
    for field, value in expected.items():
        found = facts.exif[field]
        assert found == (
            pytest.approx(value, abs=1e-8) if field != "flash" and not isinstance(value, str) else value
        ), field


@pytest.mark.skipif(EXIFTOOL is None, reason="exiftool (libimage-exiftool-perl) is not installed")
async def test_exiftool_reads_the_same_off_made_photos(reader: PhotoReader, tmp_path: Path) -> None:
    for orientation in (1, 6):
        path = tmp_path / f"{orientation}.jpg"
        path.write_bytes(jpeg(exif=exif_of({271: "Maker", 272: "Model 5", 305: "v1.2", 274: orientation}, place=PLACE)))
        facts = await reader.read(path, JPEG)
        expected = by_exiftool(path)
        assert facts.exif.pop("gps") == pytest.approx(expected.pop("gps"), abs=1e-8)
        assert facts.exif == expected
