"""What the steps of a photo make of it, and what they cannot."""

from __future__ import annotations

import asyncio
import io
import shutil
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from photo_files import PLACE, exif_of, jpeg, png, with_segment
from photo_line import CLEAN_FIELDS, PHOTO, OpenLine
from PIL import Image
from PIL.ExifTags import IFD
from probe_world import until
from prometheus_client import generate_latest

from upload_pipeline.database import photos
from upload_pipeline.errors import ErrorCode
from upload_pipeline.photo_types import JPEG, PNG
from upload_pipeline.storage.photo_keys import shared_key, thumbnail_key
from upload_pipeline.storage.photo_objects import remove_photo_objects
from upload_pipeline.storage.store import open_store
from upload_workers.process import running_worker


async def test_a_photo_becomes_a_row_and_a_thumbnail(open_line: OpenLine) -> None:
    line = await open_line()
    await line.run_to(await line.claim(), "extracted")
    row, objects = await line.row(), await line.objects()
    assert (row["width"], row["height"], row["warnings"], row["shared_key"]) == (500, 700, [], None)
    assert row["exif"]["gps"] == {"latitude": -33.8569, "longitude": -70.650972222, "altitude_m": -12.5}
    assert (row["file_bytes"], row["file_sha256"]) == (len(PHOTO), sha256(PHOTO).hexdigest())
    assert row["thumbnail_key"] == thumbnail_key(line.raw_key)
    assert objects[".jpg"] == PHOTO
    with Image.open(io.BytesIO(objects[".thumbnail.jpg"])) as thumbnail:
        assert thumbnail.size == (366, 512)
    assert set(objects) == {".jpg", ".thumbnail.jpg"}
    assert list(line.context.scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "media_type", "ending"), [(PHOTO, JPEG, ".jpg"), (png(exif=exif_of(place=PLACE)), PNG, ".png")]
)
async def test_a_project_may_have_photos_without_their_place(
    open_line: OpenLine, tmp_path: Path, data: bytes, media_type: str, ending: str
) -> None:
    line = await open_line(data, media_type)
    await line.drop_gps()
    await line.run_to(await line.claim(), "extracted")
    row, objects = await line.row(), await line.objects()
    assert set(objects) == {f".shared{ending}", ".thumbnail.jpg"}, "the original stays"
    copy = objects[f".shared{ending}"]
    assert row["shared_key"] == shared_key(line.raw_key)
    assert (row["file_bytes"], row["file_sha256"]) == (len(copy), sha256(copy).hexdigest())
    assert "gps" not in row["exif"]
    assert row["exif"].keys() >= CLEAN_FIELDS
    with Image.open(io.BytesIO(copy)) as cleaned, Image.open(io.BytesIO(data)) as original:
        assert cleaned.tobytes() == original.tobytes()
        assert (bool(original.getexif().get_ifd(IFD.GPSInfo)), cleaned.getexif().get_ifd(IFD.GPSInfo)) == (True, {})
    assert b"GPS" not in copy
    await remove_photo_objects(line.context.store, line.raw_key)
    assert await line.objects() == {}


async def test_a_bucket_serves_as_well(open_line: OpenLine, s3_bucket: str) -> None:
    local = await open_line(stored=False)
    line = replace(local, context=replace(local.context, store=open_store(f"s3://{s3_bucket}/some/prefix")))
    await line.put(PHOTO)
    await line.drop_gps()
    await line.run_to(await line.claim(), "extracted")
    objects = await line.objects()
    assert set(objects) == {".shared.jpg", ".thumbnail.jpg"}
    assert (await line.row())["file_sha256"] == sha256(objects[".shared.jpg"]).hexdigest()


def listed_by_exiftool(path: Path) -> str:
    command = [shutil.which("exiftool") or "", "-a", "-G1", "-ee3", "-U", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool (libimage-exiftool-perl) is not installed")
async def test_exiftool_finds_no_place_in_what_is_stored(open_line: OpenLine, tmp_path: Path) -> None:
    line = await open_line(with_segment(PHOTO, 0xE6, b"GoPro\x00" + b"GPS5" * 20))
    await line.drop_gps()
    await line.run_to(await line.claim(), "extracted")
    for name, content in (await line.objects()).items():
        path = tmp_path / f"object{name}"
        path.write_bytes(content)
        assert "GPS" not in await asyncio.to_thread(listed_by_exiftool, path)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (PHOTO[:-4000], ErrorCode.CORRUPT_IMAGE),
        (jpeg(Image.new("L", (6000, 4000))), ErrorCode.IMAGE_TOO_LARGE),
    ],
)
@pytest.mark.parametrize("drop", [False, True])
async def test_what_cannot_be_decoded_is_refused(open_line: OpenLine, data: bytes, code: ErrorCode, drop: bool) -> None:
    line = await open_line(data)
    await line.drop_gps(drop)
    job = await line.run_to(await line.claim(), "extracting")
    error = await line.refusal(job)
    assert (error.code, error.retryable) == (code, False)
    assert (await line.row())["width"] is None


async def test_whatever_exif_holds_can_be_stored(open_line: OpenLine) -> None:
    exif = exif_of({271: "Ma\x00ker\x01 \u00fc", 272: b"\xff\xfe\x00"}, {33434: float("nan"), 37386: 1e300, 34855: -1})
    line = await open_line(jpeg(exif=exif))
    await line.run_to(await line.claim(), "extracted")
    assert (await line.row())["exif"]["camera_make"] == "Ma"


async def test_a_photo_that_goes_between_two_steps_is_named(open_line: OpenLine) -> None:
    line = await open_line()
    job = await line.run_to(await line.claim(), "extracting")
    await line.context.store.delete([line.raw_key])
    assert (await line.refusal(job)).code is ErrorCode.OBJECT_MISSING


async def test_a_worker_takes_a_photo_that_comes_late_through_its_stages(open_line: OpenLine, database: Any) -> None:
    line = await open_line(stored=False)

    async def extracted() -> Any:
        return (await line.row())["thumbnail_key"]

    async with running_worker(line.context.settings, database.worker_url) as runner:
        await line.put(PHOTO)
        await photos.announce_photo(line.context.db, line.photo, "uploaded")
        await until(extracted, "photo extracted", 20.0)
        shown = generate_latest(runner.metrics.registry).decode()
    assert 'provider_calls_total{operation="read_photo",outcome="ok",provider="local"} 1.0' in shown
    assert (await line.row())["width"] == 500
