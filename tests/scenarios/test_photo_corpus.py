"""The photos of the corpus through the service, by curl, to a directory and to a bucket; and files that are none."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from photo_corpus import CORPUS, EXIFTOOL, by_exiftool, corpus_photos
from photo_files import PLACE, bomb, exif_of, jpeg, picture
from PIL import Image
from PIL.ExifTags import IFD

from tests.api.live_service import new_user
from tests.scenarios.photo_desk import CURL, PhotoDesk, fetched, photo_desk

PLACED = jpeg(picture(900, 600), exif=exif_of({271: "Maker", 274: 6}, place=PLACE))

pytestmark = [
    pytest.mark.skipif(not CURL, reason="curl is not here"),
    pytest.mark.parametrize("where", ["directory", "bucket"]),
]


@pytest.fixture
async def desk(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> AsyncIterator[PhotoDesk]:
    chosen: dict[str, Any] = {"max_photo_pixels": 20_000_000}
    if where == "bucket":
        chosen["storage_url"] = f"s3://{request.getfixturevalue('s3_bucket')}/photos"
    async with photo_desk(database, admin, tmp_path, **chosen) as desk:
        yield desk


@pytest.mark.skipif(not corpus_photos(), reason="the corpus (../shared/corpus) is not here")
async def test_the_photos_of_the_corpus(desk: PhotoDesk) -> None:
    async def one(row: dict[str, str]) -> None:
        path, (verdict, _, code) = CORPUS / row["path"], row["expected"].partition(" ")
        content = path.read_bytes()
        if code == "FILE_TOO_SMALL":
            refused = await desk.announce(path.name, len(content))
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
            return
        photo = await desk.send(path.name, content)
        if verdict == "reject":
            assert (photo["status"], photo["error"]["code"]) == ("failed", code), path.name
            return
        assert (photo["status"], photo["error"], photo["detections"]) == ("completed", None, None), path.name
        statuses = [change["status"] for change in photo["status_history"]]
        assert statuses == ["pending_upload", "uploaded", "processing", "completed"]
        assert await fetched(photo["download_url"]) == content
        with Image.open(io.BytesIO(await fetched(photo["thumbnail_url"]))) as small:
            assert max(small.size) <= 512
            assert small.width / small.height == pytest.approx(photo["width"] / photo["height"], rel=0.02)
        if EXIFTOOL is None:
            return  # the reader's own tests say that they are skipped
        expected, found = await asyncio.to_thread(by_exiftool, path), photo["exif_data"]
        assert found.keys() == expected.keys(), path.name
        assert found.pop("gps", {}) == pytest.approx(expected.pop("gps", {}), abs=1e-8), path.name
        assert found == expected, path.name

    await asyncio.gather(*(one(row) for row in corpus_photos()))


async def test_what_is_no_photo_and_who_may_not_send_one_and_a_project_without_places(desk: PhotoDesk) -> None:
    await no_photo_ends_as_stated(desk)
    await a_url_is_for_one_photo_of_one_length_and_type(desk)
    await a_project_without_places_hands_none_out(desk)


async def no_photo_ends_as_stated(desk: PhotoDesk) -> None:
    polyglot, trailed = b"%PDF-1.7\n" + PLACED, PLACED + b"PK\x03\x04 an archive, read from its end"
    sent = {
        "polyglot.jpg": desk.send("polyglot.jpg", polyglot),
        "bomb.png": desk.send("bomb.png", bomb(30_000, 30_000)),
        "cut.jpg": desk.send("cut.jpg", PLACED[:-4000]),
        "trailed.jpg": desk.send("trailed.jpg", trailed),
    }
    ends = dict(zip(sent, await asyncio.gather(*sent.values()), strict=True))
    codes = {name: (photo["error"] or {}).get("code") for name, photo in ends.items()}
    assert codes == {
        "polyglot.jpg": "TYPE_MISMATCH",
        "bomb.png": "IMAGE_TOO_LARGE",
        "cut.jpg": "CORRUPT_IMAGE",
        "trailed.jpg": None,
    }
    assert any("follow the picture" in warning for warning in ends["trailed.jpg"]["warnings"])
    assert all(ends[name]["download_url"] is None for name, code in codes.items() if code)


async def a_url_is_for_one_photo_of_one_length_and_type(desk: PhotoDesk) -> None:
    told = (await desk.announce("roof.jpg", len(PLACED))).json()
    assert await desk.put(told, PLACED[:-1]) >= 400
    assert await desk.put(told, PLACED + b"x") >= 400
    assert await desk.put(told, PLACED, **{"Content-Type": "image/png"}) >= 400
    assert (await desk.photo(told))["status"] == "pending_upload"
    stranger = desk.service.client(new_user())
    for answer in (
        await stranger.get(f"/api/v1/photos/{told['photo_id']}"),
        await stranger.patch(f"/api/v1/photos/{told['photo_id']}/status", json={"status": "uploaded"}),
        await stranger.delete(f"/api/v1/photos/{told['photo_id']}"),
    ):
        assert answer.status_code == 404
    assert await desk.put(told, PLACED) in (200, 204)
    assert (await desk.client.delete(f"/api/v1/photos/{told['photo_id']}")).status_code in (200, 204)


async def a_project_without_places_hands_none_out(desk: PhotoDesk) -> None:
    await desk.admin.execute("select upload_pipeline.set_project($1, p_drop_gps => true)", desk.office.project_id)
    photo = await desk.send("roof.jpg", PLACED)
    assert photo["status"] == "completed"
    assert "gps" not in json.dumps(photo["exif_data"])
    assert (photo["width"], photo["height"], photo["exif_data"]["camera_make"]) == (600, 900, "Maker")
    copy = await fetched(photo["download_url"])
    assert len(copy) == photo["file_size"]
    store = desk.service.resources.store
    stored = [info.key async for info in store.list() if photo["id"] in info.key]
    assert sorted(key.rpartition("/")[2].partition(".")[2] for key in stored) == ["shared.jpg", "thumbnail.jpg"]
    for key in stored:
        with Image.open(io.BytesIO(await store.get_bytes(key, 10**7))) as image:
            assert not image.getexif().get_ifd(IFD.GPSInfo)
    path = desk.folder / "copy.jpg"
    path.write_bytes(copy)
    if EXIFTOOL is not None:
        assert "gps" not in await asyncio.to_thread(by_exiftool, path)
    assert (await desk.client.delete(f"/api/v1/photos/{photo['id']}")).status_code in (200, 204)
    assert [info.key async for info in store.list() if photo["id"] in info.key] == []
