"""A member of an organisation who sends photos to the service by curl, and a worker behind it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from tests.api.live_service import LiveService, running_service, service_settings
from tests.api.photo_rows import Office, add_office
from upload_workers.process import running_worker

CURL = shutil.which("curl") or ""
TYPES = {".jpg": "image/jpeg", ".png": "image/png"}


@dataclass(frozen=True)
class PhotoDesk:
    """A member of an organisation at work with the service, and a worker behind it."""

    service: LiveService
    client: httpx.AsyncClient
    office: Office
    folder: Path
    admin: asyncpg.Connection

    async def announce(self, name: str, size: int, **changed: Any) -> httpx.Response:
        """The answer to a photo that is announced."""
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

    async def sent(self, name: str, content: bytes, **changed: Any) -> dict[str, Any]:
        """What was told of a photo that is announced, put, and said to be there."""
        answer = await self.announce(name, len(content), **changed)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert await self.put(told, content) in (200, 204)
        said = await self.client.patch(f"/api/v1/photos/{told['photo_id']}/status", json={"status": "uploaded"})
        # 409: the job had looked for itself by then, and refused it
        assert said.status_code in (200, 409), said.text
        return dict(told)

    async def ended(self, told: dict[str, Any]) -> dict[str, Any]:
        """The photo at its end."""
        async with asyncio.timeout(60):
            while (photo := await self.photo(told))["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.05)
        return photo

    async def send(self, name: str, content: bytes) -> dict[str, Any]:
        """The photo at its end, from its announcement on."""
        return await self.ended(await self.sent(name, content))

    async def photo(self, told: dict[str, Any]) -> dict[str, Any]:
        """The photo as it stands."""
        answer = await self.client.get(f"/api/v1/photos/{told['photo_id']}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@asynccontextmanager
async def photo_desk(
    database: Any, admin: asyncpg.Connection, home: Path, **settings: Any
) -> AsyncGenerator[PhotoDesk]:
    """The service and one worker at work while entered, with quick looks and these settings."""
    chosen = service_settings(database.worker_url, home, poll_min=0.05, poll_max=0.2, **settings)
    office = await add_office(admin)
    async with running_service(chosen) as service, running_worker(chosen, database.worker_url):
        yield PhotoDesk(service, service.client(office.member), office, home, admin)


async def fetched(url: str) -> bytes:
    """What anybody gets who has a signed URL."""
    async with httpx.AsyncClient() as anybody:
        answer = await anybody.get(url)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] in TYPES.values()
    return answer.content
