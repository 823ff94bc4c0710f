"""With files in a bucket, bytes go between client and bucket; the service hands out URLs and never sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from s3_servers import S3Server

from tests.api.live_service import LiveService, follow, new_user, running_service, service_settings
from upload_workers.process import running_worker

CONTENT = b"# Hail\n\nThe roof was struck by hail as large as walnuts.\n"


@pytest.fixture
async def service(database: Any, s3_bucket: str, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(database.worker_url, tmp_path, storage_url=f"s3://{s3_bucket}/files", poll_max=0.3)
    async with running_service(settings) as running:
        yield running


async def test_a_file_goes_to_the_bucket_and_comes_back_from_it(
    service: LiveService, s3_server: S3Server, s3_bucket: str
) -> None:
    client = service.client(new_user())
    announced = await client.post(
        "/api/v2/upload",
        json={
            "filename": "hagel.md",
            "bytes_len": len(CONTENT),
            "mime": "text/markdown",
            "sha256": sha256(CONTENT).hexdigest(),
        },
    )
    assert announced.status_code == 202, announced.text
    told = announced.json()
    assert told["upload_url"].startswith(f"{s3_server.endpoint}/{s3_bucket}/files/raw/")
    async with httpx.AsyncClient() as outside:  # without credentials of the service
        refused = await outside.put(told["upload_url"], content=CONTENT.upper(), headers=told["upload_headers"])
        assert (refused.status_code, s3_server.listing(s3_bucket).count("<Key>")) == (400, 0)
        sent = await outside.put(told["upload_url"], content=CONTENT, headers=told["upload_headers"])
        assert sent.status_code == 200, sent.text
        assert (await client.post(f"/api/v2/upload/{told['document_id']}/complete")).status_code < 300
        async with running_worker(service.settings, service.settings.database_url.get_secret_value()):
            assert (await follow(client, told["job_id"]))[-1].data == {"state": "done"}
        download = (await client.get(f"/api/v2/documents/{told['document_id']}/download")).json()
        assert download["download_url"].startswith(s3_server.endpoint)
        fetched = await outside.get(download["download_url"])
    assert (fetched.status_code, fetched.content) == (200, CONTENT)
    assert fetched.headers["content-disposition"] == 'attachment; filename="hagel.md"'
    assert fetched.headers["content-type"].startswith("text/markdown")
    await _ends_by_rule_and_comes_back(service, client, told["document_id"])
    assert (await client.delete(f"/api/v2/documents/{told['document_id']}")).status_code == 204
    assert "<Key>" not in s3_server.listing(s3_bucket)


async def _ends_by_rule_and_comes_back(service: LiveService, client: httpx.AsyncClient, document: str) -> None:
    """What a life-cycle rule does to a file as it was uploaded, and what the service says and does then."""
    store, path = service.resources.store, f"/api/v2/documents/{document}"
    await store.delete([info.key async for info in store.list("raw")])
    gone = await client.get(f"{path}/download")
    assert (gone.status_code, gone.json()["error"]["code"]) == (409, "OBJECT_MISSING")
    assert (await client.get(f"{path}/markdown")).status_code == 200
    hits = (await client.post("/api/v2/search", json={"query": "hail", "limit": 1})).json()["hits"]
    assert [hit["document_id"] for hit in hits] == [document]
    again = await client.post("/api/v2/upload", files={"file": ("hagel.md", CONTENT, "text/markdown")})
    assert again.json()["document_id"] == document
    assert (await client.get(f"{path}/download")).status_code == 200


async def test_a_form_goes_through_the_service_into_the_bucket(
    service: LiveService, s3_server: S3Server, s3_bucket: str
) -> None:
    client = service.client(new_user())
    sent = await client.post("/api/v2/upload", files={"file": ("hail.md", CONTENT, "text/markdown")})
    assert sent.status_code == 202, sent.text
    refused = await client.post("/api/v2/upload", files={"file": ("photo.pdf", b"\x89PNG\r\n\x1a\n" + bytes(99))})
    assert refused.status_code >= 400
    assert s3_server.listing(s3_bucket).count("<Key>") == 1
    assert (await client.delete(f"/api/v2/documents/{sent.json()['document_id']}")).status_code == 204
    assert "<Key>" not in s3_server.listing(s3_bucket)
