"""With files in a bucket of Google or a container of Azure: the way of a document, and who hands out its URLs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_service import LiveService, follow, new_user, running_service, service_settings

from tests.simulators.azure_blob import ACCOUNT, KEY, AzureBlob
from tests.simulators.gcs import GoogleStorage
from tests.simulators.object_server import Bucket, ObjectServer
from upload_workers.process import running_worker

CONTENT = b"# Hail\n\nThe roof was struck by hail as large as walnuts.\n"


@dataclass
class Setup:
    server: ObjectServer
    service: LiveService
    signs_uploads: bool


@pytest.fixture(params=["gs", "az"])
async def setup(
    request: pytest.FixtureRequest, database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Setup]:
    async with AsyncExitStack() as stack:
        server: ObjectServer
        if request.param == "gs":
            server = google = await stack.enter_async_context(GoogleStorage(buckets={"files": Bucket()}))
            given = {"GOOGLE_BASE_URL": google.url, "GOOGLE_SERVICE_ACCOUNT_KEY": google.account()}
        else:
            server = azure = await stack.enter_async_context(AzureBlob(buckets={"files": Bucket()}))
            given = {
                "AZURE_STORAGE_ENDPOINT": azure.endpoint,
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            }
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        settings = service_settings(
            database.worker_url, tmp_path, storage_url=f"{request.param}://files/claims", poll_max=0.3
        )
        service = await stack.enter_async_context(running_service(settings))
        yield Setup(server, service, signs_uploads=request.param == "gs")


async def test_a_file_goes_there_and_comes_back_and_leaves_nothing(setup: Setup) -> None:
    service, server = setup.service, setup.server
    client = service.client(new_user())
    body = {
        "filename": "hagel.md",
        "bytes_len": len(CONTENT),
        "mime": "text/markdown",
        "sha256": sha256(CONTENT).hexdigest(),
    }
    told = (await client.post("/api/v2/upload", json=body)).json()
    assert told["upload_url"].startswith(server.url if setup.signs_uploads else service.url)
    async with httpx.AsyncClient() as anybody:
        shorter = await anybody.put(told["upload_url"], content=CONTENT[:-1], headers=told["upload_headers"])
        assert shorter.status_code == 400
        sent = await anybody.put(told["upload_url"], content=CONTENT, headers=told["upload_headers"])
        assert sent.status_code in {200, 204}, sent.text
        assert (await client.post(f"/api/v2/upload/{told['document_id']}/complete")).status_code == 200
        async with running_worker(service.settings, service.settings.database_url.get_secret_value()):
            assert (await follow(client, told["job_id"]))[-1].data == {"state": "done"}
        hits = (await client.post("/api/v2/search", json={"query": "hail", "limit": 1})).json()["hits"]
        assert [hit["document_id"] for hit in hits] == [told["document_id"]]
        if setup.signs_uploads:  # the URL is good for minutes yet, and what the job has looked at is what stays
            late = await anybody.put(told["upload_url"], content=CONTENT.upper(), headers=told["upload_headers"])
            assert late.status_code == 412
        download = (await client.get(f"/api/v2/documents/{told['document_id']}/download")).json()
        assert download["download_url"].startswith(server.url)
        fetched = await anybody.get(download["download_url"])
    assert (fetched.status_code, fetched.content) == (200, CONTENT)
    assert fetched.headers["content-disposition"] == 'attachment; filename="hagel.md"'
    assert fetched.headers["content-type"].startswith("text/markdown")
    assert len(server.keys("files")) == 3
    assert all(key.startswith(("claims/raw/", "claims/parsed/")) for key in server.keys("files"))
    assert (await client.delete(f"/api/v2/documents/{told['document_id']}")).status_code == 204
    assert server.keys("files") == set()


async def test_other_bytes_of_the_announced_length_are_found_out_by_the_job_or_before(setup: Setup) -> None:
    """Of the content itself Google binds nothing; the service's own URL looks at it."""
    client = setup.service.client(new_user())
    body = {
        "filename": "hagel.md",
        "bytes_len": len(CONTENT),
        "mime": "text/markdown",
        "sha256": sha256(CONTENT).hexdigest(),
    }
    told = (await client.post("/api/v2/upload", json=body)).json()
    async with httpx.AsyncClient() as anybody:
        sent = await anybody.put(told["upload_url"], content=CONTENT.upper(), headers=told["upload_headers"])
    if not setup.signs_uploads:
        assert sent.json()["error"]["code"] == "CHECKSUM_MISMATCH"
        return
    assert sent.status_code == 200
    settings = setup.service.settings
    async with running_worker(settings, settings.database_url.get_secret_value()):
        assert (await follow(client, told["job_id"]))[-1].data == {"state": "deadletter"}
        job = (await client.get(f"/api/v2/jobs/{told['job_id']}")).json()
        assert job["error"]["code"] == "CHECKSUM_MISMATCH"
        # The wrong bytes stand where the right ones belong: announced again, those come through the service.
        again = (await client.post("/api/v2/upload", json=body)).json()
        assert again["upload_url"].startswith(setup.service.url)
        async with httpx.AsyncClient() as anybody:
            sent = await anybody.put(again["upload_url"], content=CONTENT, headers=again["upload_headers"])
        assert sent.status_code == 204, sent.text
        assert (await follow(client, again["job_id"]))[-1].data == {"state": "done"}
