"""The photos of the corpus through the service, by curl, to a directory and to a bucket; and files that are none."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from photo_corpus import CORPUS, EXIFTOOL, by_exiftool, corpus_photos
from photo_files import PLACE, bomb, exif_of, jpeg, picture
from PIL import Image

from tests.api.live_service import LiveService, new_user, running_service, service_settings
from tests.api.photo_rows import Office, add_office
from upload_workers.process import running_worker

CURL = shutil.which("curl") or ""
TYPES = {".jpg": "image/jpeg", ".png": "image/png"}
PLACED = jpeg(picture(900, 600), exif=exif_of({271: "Maker", 274: 6}, place=PLACE))

pytestmark = [
    pytest.mark.skipif(not CURL, reason="curl is not here"),
    pytest.mark.parametrize("where", ["directory", "bucket"]),
]


@dataclass(frozen=True)
class Desk:
    """A member of an organisation at work with the service, and a worker behind it."""

    service: LiveService
    client: httpx.AsyncClient
    office: Office
    folder: Path
    admin: asyncpg.Connection

    async def announce(self, name: str, size: int, **changed: Any) -> httpx.Response:
        asked = {"file_name": name, "file_size": size, "mime_type": TYPES[Path(name).suffix], **changed}
        body = {"project_id": str(self.office.project_id), **asked}
        return await self.client.post("/api/v1/photos/upload-url", json=body)

    async def put(self, told: dict[str, Any], content: bytes, **headers: str) -> int:
        """`curl -T`; the status that it got."""
        path = self.folder / f"{told['photo_id']}.sent"
        path.write_bytes(content)
        asked = {**told["headers"], **headers}
        asked.pop("Content-Length", None)  # curl says how long the file is, right or wrong
        lines = [part for name, value in asked.items() for part in ("-H", f"{name}: {value}")]
        command = [
            CURL,
            "-sS",
            "--max-time",
            "30",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-T",
            str(path),
            *lines,
            told["upload_url"],
        ]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        shown, _ = await process.communicate()
        return int(shown)

    async def send(self, name: str, content: bytes) -> dict[str, Any]:
        """The photo at its end: announced, put, said to be there, and worked on."""
        answer = await self.announce(name, len(content))
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert await self.put(told, content) in (200, 204)
        said = await self.client.patch(f"/api/v1/photos/{told['photo_id']}/status", json={"status": "uploaded"})
        # 409: the job had looked for itself by then, and refused it
        assert said.status_code in (200, 409), said.text
        async with asyncio.timeout(60):
            while (photo := await self.photo(told))["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.05)
        return photo

    async def photo(self, told: dict[str, Any]) -> dict[str, Any]:
        answer = await self.client.get(f"/api/v1/photos/{told['photo_id']}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture
async def desk(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> AsyncIterator[Desk]:
    chosen: dict[str, Any] = {"poll_min": 0.05, "poll_max": 0.2, "max_photo_pixels": 20_000_000}
    if where == "bucket":
        chosen["storage_url"] = f"s3://{request.getfixturevalue('s3_bucket')}/photos"
    settings = service_settings(database.worker_url, tmp_path, **chosen)
    office = await add_office(admin)
    async with running_service(settings) as service, running_worker(settings, database.worker_url):
        yield Desk(service, service.client(office.member), office, tmp_path, admin)


async def fetched(url: str) -> bytes:
    async with httpx.AsyncClient() as anybody:
        answer = await anybody.get(url)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] in TYPES.values()
    return answer.content


@pytest.mark.skipif(not corpus_photos(), reason="the corpus (../shared/corpus) is not here")
async def test_the_photos_of_the_corpus(desk: Desk) -> None:
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


async def test_what_is_no_photo_and_who_may_not_send_one_and_a_project_without_places(desk: Desk) -> None:
    await no_photo_ends_as_stated(desk)
    await a_url_is_for_one_photo_of_one_length_and_type(desk)
    await a_project_without_places_hands_none_out(desk)


async def no_photo_ends_as_stated(desk: Desk) -> None:
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


async def a_url_is_for_one_photo_of_one_length_and_type(desk: Desk) -> None:
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


async def a_project_without_places_hands_none_out(desk: Desk) -> None:
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
        assert b"GPS" not in await store.get_bytes(key, 10**7)
    path = desk.folder / "copy.jpg"
    path.write_bytes(copy)
    if EXIFTOOL is not None:
        assert "gps" not in await asyncio.to_thread(by_exiftool, path)
    assert (await desk.client.delete(f"/api/v1/photos/{photo['id']}")).status_code in (200, 204)
    assert [info.key async for info in store.list() if photo["id"] in info.key] == []
