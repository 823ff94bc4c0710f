"""Uploads where objects are kept in a bucket: announced bytes go there by its own URLs, past the service."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from live_service import LiveService, new_user, running_service, service_settings
from upload_traces import Traces

UPLOAD = "/api/v2/upload"
TEXT = b"Plain words, enough of them to be a file.\n" * 20
ANNOUNCED = {
    "filename": "note.txt",
    "bytes_len": len(TEXT),
    "mime": "text/plain",
    "sha256": hashlib.sha256(TEXT).hexdigest(),
}


@pytest.fixture
async def service(database: Any, tmp_path: Path, s3_bucket: str) -> AsyncIterator[LiveService]:
    settings = service_settings(database.worker_url, tmp_path, storage_url=f"s3://{s3_bucket}/files")
    async with running_service(settings) as running:
        yield running


async def test_announced_bytes_go_to_the_bucket_and_nothing_else_does(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    traces, user = Traces(service, admin), new_user()
    client = service.client(user)
    told = (await client.post(UPLOAD, json=ANNOUNCED)).json()
    complete = f"{UPLOAD}/{told['document_id']}/complete"
    assert not told["upload_url"].startswith(service.url)
    assert told["upload_headers"]["Content-Type"] == "text/plain"
    assert (await client.post(complete)).json()["error"]["code"] == "OBJECT_MISSING"
    async with httpx.AsyncClient() as anybody:

        async def put(data: bytes, **headers: str) -> int:
            given = {**told["upload_headers"], "Content-Length": str(len(data)), **headers}
            return (await anybody.put(told["upload_url"], content=data, headers=given)).status_code

        assert await put(TEXT[:-2] + b"!\n") >= 400
        assert await put(TEXT[:-2]) >= 400
        assert await put(TEXT, **{"Content-Type": "text/html"}) >= 400
        assert await traces.keys() == set()
        assert await put(TEXT) == 200
    raw_key = (await traces.document())["raw_key"]
    assert await traces.keys() == {raw_key}
    assert await service.resources.store.get_bytes(raw_key, len(TEXT)) == TEXT
    answer = await client.post(complete)
    assert (answer.status_code, answer.json()["job_id"]) == (200, told["job_id"])


async def test_a_form_goes_through_the_service(service: LiveService, admin: asyncpg.Connection) -> None:
    traces, client = Traces(service, admin), service.client(new_user())
    answer = await client.post(UPLOAD, files={"file": ("a.txt", TEXT)})
    assert answer.status_code == 202
    assert await traces.keys() == {(await traces.document())["raw_key"]}
    refused = await client.post(UPLOAD, files={"file": ("a.pdf", b"%PDF-1.7 and no more")})
    assert refused.status_code == 400
    assert len(await traces.keys()) == 1
    assert await traces.files() == []
