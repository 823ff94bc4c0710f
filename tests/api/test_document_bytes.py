"""Downloads: a signed URL, what it gives, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import httpx
import pytest

from tests.api.document_rows import StoredDocument, add_document, objects_left
from tests.api.live_service import LiveService, new_user, running_service, service_settings
from upload_pipeline.media_types import DOCX, HTML, PDF
from upload_pipeline.storage.keys import markdown_key, raw_key
from upload_pipeline.storage.signed_urls import Grant, UrlSigner


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


async def download(service: LiveService, added: StoredDocument) -> dict[str, Any]:
    answer = await service.client(added.user_id).get(f"/api/v2/documents/{added.document_id}/download")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def bytes_url(service: LiveService, added: StoredDocument, signer: UrlSigner | None = None, **changes: Any) -> str:
    """A URL with a token of the service that grants something else than it would."""
    grant: dict[str, Any] = {
        "method": "GET",
        "document_id": added.document_id,
        "key": raw_key(added.user_id, added.document_id),
        "expires_at": datetime.now(UTC) + timedelta(minutes=1),
        **changes,
    }
    token = (signer or service.resources.signer).sign(Grant(**grant))
    return f"/api/v2/documents/{added.document_id}/bytes?token={token}"


async def test_the_url_gives_the_bytes_without_credentials_and_only_to_be_saved(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    content = os.urandom(1_500_000)  # more than two blocks
    added = await add_document(
        admin, service.resources.store, new_user(), filename='Grüße "2026".pdf', media_type=PDF, content=content
    )
    before = datetime.now(UTC)
    told = await download(service, added)
    assert told.keys() == {"download_url", "expires_at", "filename", "media_type", "file_bytes"}
    assert (told["filename"], told["media_type"], told["file_bytes"]) == ('Grüße "2026".pdf', PDF, len(content))
    left = datetime.fromisoformat(told["expires_at"]) - before
    assert timedelta(seconds=298) < left <= timedelta(seconds=301)
    assert told["download_url"].startswith(f"{service.url}/api/v2/documents/{added.document_id}/bytes?token=")
    for _ in range(2):  # as often as one likes
        answer = await service.client().get(told["download_url"])
        assert answer.status_code == 200
        assert answer.content == content
    headers = answer.headers
    assert headers["Content-Type"] == PDF
    assert headers["Content-Length"] == str(len(content))
    assert headers["Content-Disposition"] == (
        "attachment; filename=\"Grue _2026_.pdf\"; filename*=UTF-8''Gr%C3%BC%C3%9Fe%20%222026%22.pdf"
    )
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"


async def test_a_page_that_was_uploaded_is_no_page_of_this_service(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    """Saved and not shown; and if it is shown, then without scripts."""
    page = b"<html><script>alert(1)</script></html>"
    added = await add_document(
        admin, service.resources.store, new_user(), filename="page.html", media_type=HTML, content=page
    )
    answer = await service.client().get((await download(service, added))["download_url"])
    assert answer.content == page
    assert answer.headers["Content-Type"] == HTML  # nobody knows its charset
    assert answer.headers["Content-Disposition"] == 'attachment; filename="page.html"'
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")


async def test_the_url_is_below_the_public_one_where_there_is_one(database: Any, tmp_path: Path, admin: Any) -> None:
    settings = service_settings(
        database.worker_url, tmp_path, api_public_url="https://files.example.com/pipeline/", download_url_seconds=1
    )
    async with running_service(settings) as service:
        added = await add_document(admin, service.resources.store, new_user())
        url = (await download(service, added))["download_url"]
        assert url.startswith(f"https://files.example.com/pipeline/api/v2/documents/{added.document_id}/bytes?token=")
        path = url.removeprefix("https://files.example.com/pipeline")
        assert (await service.client().get(path)).status_code in (200, 403)  # within its second, or behind it
        await asyncio.sleep(1.1)
        expired = await service.client().get(path)
        assert (expired.status_code, expired.json()["error"]["code"]) == (403, "SIGNED_URL_EXPIRED")


async def test_what_the_token_does_not_grant_is_refused(service: LiveService, admin: asyncpg.Connection) -> None:
    store = service.resources.store
    added, other = [await add_document(admin, store, new_user()) for _ in range(2)]
    client = service.client()
    good = bytes_url(service, added)
    assert (await client.get(good)).status_code == 200
    token = good.partition("token=")[2]
    granted, _, signature = token.partition(".")
    refused = {
        "another document's": bytes_url(service, other).replace(str(other.document_id), str(added.document_id)),
        "for another method": bytes_url(service, added, method="PUT"),
        "of another secret": bytes_url(service, added, signer=UrlSigner(b"x" * 32)),
        "cut off": good[:-1],
        "without a signature": good.replace(f".{signature}", "."),
        "changed": good.replace(granted, f"{granted[:-2]}AA"),
    }
    for name, url in refused.items():
        answer = await client.get(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "SIGNED_URL_INVALID"), name
    expired = await client.get(bytes_url(service, added, expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert (expired.status_code, expired.json()["error"]["code"]) == (403, "SIGNED_URL_EXPIRED")
    for bad in ("", "?token=", f"?token={'x' * 9000}"):
        assert (await client.get(f"/api/v2/documents/{added.document_id}/bytes{bad}")).status_code == 400, bad
    # credentials make no difference
    assert (await service.client(added.user_id).get(refused["cut off"])).status_code == 403


async def test_only_the_uploaded_bytes_are_given_out(service: LiveService, admin: asyncpg.Connection) -> None:
    """Even a token of ours for another object of the document gets nothing."""
    added = await add_document(admin, service.resources.store, new_user())
    key = markdown_key(added.user_id, added.document_id, "0" * 64)
    await service.resources.store.put_bytes(key, b"text")
    answer = await service.client().get(bytes_url(service, added, key=key))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "DOCUMENT_NOT_FOUND")


async def test_a_document_that_is_gone_is_gone_for_its_url(service: LiveService, admin: asyncpg.Connection) -> None:
    added = await add_document(admin, service.resources.store, new_user())
    url = (await download(service, added))["download_url"]
    await admin.execute("select upload_pipeline.begin_deletion($1)", added.document_id)
    assert (await service.client().get(url)).status_code == 404  # although its object is still there
    await admin.execute("select upload_pipeline.finish_deletion($1)", added.document_id)
    assert (await service.client().get(url)).status_code == 404
    never = await service.client().get(bytes_url(service, added, document_id=uuid4(), key="raw/a/b"))
    assert never.status_code == 403


async def test_bytes_that_were_lost_are_said_to_be_without_telling_where_they_were(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    added = await add_document(admin, service.resources.store, new_user())
    url = (await download(service, added))["download_url"]
    await service.resources.store.delete([raw_key(added.user_id, added.document_id)])
    again = await service.client(added.user_id).get(f"/api/v2/documents/{added.document_id}/download")
    for answer in (await service.client().get(url), again):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "OBJECT_MISSING")
        assert "Send the file again as a form" in answer.json()["error"]["message"]
        assert "raw/" not in answer.text


async def test_a_part_is_not_taken_for_the_whole(service: LiveService, admin: asyncpg.Connection) -> None:
    added = await add_document(admin, service.resources.store, new_user(), content=b"x" * 1000)
    url = (await download(service, added))["download_url"]
    await service.resources.store.put_bytes(raw_key(added.user_id, added.document_id), b"x" * 999)
    with pytest.raises(httpx.RemoteProtocolError):
        await service.client().get(url)


async def test_many_downloads_at_once_hold_little_memory(service: LiveService, admin: asyncpg.Connection) -> None:
    """Twenty clients that do not read: each holds a few blocks and not the file."""
    content = os.urandom(1 << 20) * 25
    added = await add_document(admin, service.resources.store, new_user(), content=content, media_type=DOCX)
    url = (await download(service, added))["download_url"]
    parts = urlsplit(url)
    del content
    before = memory()
    waiting = []
    try:
        for _ in range(20):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1024)
            writer.write(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            waiting.append((reader, writer))
        for reader, _ in waiting:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.5)
        assert memory() - before < 64 * 1024 * 1024
    finally:
        for _, writer in waiting:
            writer.close()


def memory() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


async def test_a_store_that_signs_gives_its_own_url(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, s3_bucket: str
) -> None:
    settings = service_settings(database.worker_url, tmp_path, storage_url=f"s3://{s3_bucket}/files")
    async with running_service(settings) as service:
        added = await add_document(
            admin, service.resources.store, new_user(), filename="Grüße.pdf", media_type=PDF, content=b"%PDF-"
        )
        url = (await download(service, added))["download_url"]
        assert not url.startswith(service.url)
        async with httpx.AsyncClient() as anybody:
            answer = await anybody.get(url)
            assert (answer.status_code, answer.content) == (200, b"%PDF-")
            assert answer.headers["Content-Type"] == PDF
            assert answer.headers["Content-Disposition"].startswith('attachment; filename="Grue.pdf"')
            assert (await anybody.get(url.replace(str(added.document_id), str(uuid4())))).status_code == 403
        assert (await service.client(added.user_id).delete(f"/api/v2/documents/{added.document_id}")).status_code == 204
        assert await objects_left(service.resources.store) == []
