"""Documents over HTTP: list, one, text, chunks, and that they are their owner's alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from tests.api.document_rows import add_document, add_text
from tests.api.job_rows import advance, claim
from tests.api.live_service import LiveService, new_user, running_service, service_settings, token
from upload_pipeline.api.app import create_app
from upload_pipeline.database import queue
from upload_pipeline.database.uploads import reserve_document
from upload_pipeline.storage.keys import markdown_key, raw_key
from upload_pipeline.storage.local_backend import LocalBackend
from upload_pipeline.storage.signed_urls import Grant

FIELDS = {
    "document_id",
    "filename",
    "media_type",
    "file_bytes",
    "file_sha256",
    "metadata",
    "markdown_sha256",
    "markdown_chars",
    "page_count",
    "chunk_count",
    "warnings",
    "created_at",
    "updated_at",
    "searchable_at",
    "upload_deadline",
    "job",
}
TEXT = "# Grüße\n\nEin Text mit Umlauten — und 漢字.\n"
READS = ("", "/markdown", "/chunks", "/download")


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


async def test_a_document_has_the_fields_of_the_contract(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    added = await add_document(admin, service.resources.store, user, metadata={"tags": ["a", "b"]})
    waiting = (await service.client(user).get(f"/api/v2/documents/{added.document_id}")).json()
    assert waiting.keys() == FIELDS
    assert waiting["metadata"] == {"tags": ["a", "b"]}
    assert (waiting["markdown_sha256"], waiting["chunk_count"], waiting["searchable_at"]) == (None, None, None)
    assert waiting["job"] == {
        "job_id": str(added.job_id),
        "pipeline": "document",
        "stage": "queued",
        "state": "queued",
        "progress": 0,
        "error": None,
    }
    await advance(admin, await claim(admin, added.job_id), "embedded")
    await add_text(admin, service.resources.store, added, TEXT, chunks=2)
    done = (await service.client(user).get(f"/api/v2/documents/{added.document_id}")).json()
    assert (done["job"]["state"], done["job"]["progress"], done["chunk_count"]) == ("done", 100, 2)
    assert done["markdown_sha256"] == sha256(TEXT.encode()).hexdigest()
    assert (await service.client(user).get("/api/v2/documents")).json() == {"items": [done], "next_cursor": None}


async def test_the_newest_job_is_shown_with_its_failure(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    client = service.client(user)
    added = await add_document(admin, service.resources.store, user)
    failing = await claim(admin, added.job_id)
    await queue.fail_job(admin, failing.lease, code="ENCRYPTED", message="It has a password.", retryable=False)
    path = f"/api/v2/documents/{added.document_id}"
    failed = (await client.get(path)).json()["job"]
    assert failed["error"] == {"code": "ENCRYPTED", "message": "It has a password.", "details": {}}
    (second,) = await queue.enqueue_jobs(admin, [(added.document_id, user)])
    newest = (await client.get(path)).json()["job"]
    assert (newest["job_id"], newest["error"]) == (str(second.job_id), None)
    assert (await client.get("/api/v2/documents?state=deadletter")).json()["items"] == []
    await admin.execute("delete from upload_pipeline.upload_jobs")
    assert (await client.get(path)).json()["job"] is None
    assert len((await client.get("/api/v2/documents")).json()["items"]) == 1


async def test_pages_of_a_list_show_each_document_once_newest_first(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    store = service.resources.store
    at = [datetime(2026, 1, day, tzinfo=UTC) for day in (9, 9, 8, 7, 7, 7, 1)]
    added = [await add_document(admin, store, user, created_at=moment) for moment in at]
    await add_document(admin, store, new_user())
    newest = sorted(zip(at, added, strict=True), key=lambda one: (-one[0].timestamp(), one[1].document_id))
    client = service.client(user)
    for limit in (1, 2, 3, 7, 100):
        seen: list[str] = []
        cursor: str | None = None
        while True:
            query = {"limit": limit} | ({"cursor": cursor} if cursor else {})
            page = (await client.get("/api/v2/documents", params=query)).json()
            assert len(page["items"]) <= limit
            seen += [item["document_id"] for item in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == [str(document.document_id) for _, document in newest]


async def test_a_document_that_comes_or_goes_between_two_pages_shifts_nothing(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    store = service.resources.store
    added = [str((await add_document(admin, store, user)).document_id) for _ in range(5)]
    client = service.client(user)
    first = (await client.get("/api/v2/documents", params={"limit": 2})).json()
    await add_document(admin, store, user)
    assert (await client.delete(f"/api/v2/documents/{first['items'][1]['document_id']}")).status_code == 204
    second = (await client.get("/api/v2/documents", params={"limit": 3, "cursor": first["next_cursor"]})).json()
    assert [item["document_id"] for item in first["items"] + second["items"]] == added[::-1]


async def test_a_list_is_restricted_by_each_filter(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    store = service.resources.store
    water = await add_document(admin, store, user, filename="Water 100%.pdf", metadata={"department": "claims"})
    fire = await add_document(
        admin, store, user, filename="fire_1.pdf", metadata={"department": "claims", "year": 2026}
    )
    notes = await add_document(admin, store, user, filename="notes.txt", metadata={"tags": ["a", "b"]})
    await queue.cancel_job(admin, notes.job_id)
    await advance(admin, await claim(admin, fire.job_id), "parsing")
    client = service.client(user)

    async def found(**query: str) -> set[UUID]:
        answer = await client.get("/api/v2/documents", params=query)
        assert answer.status_code == 200, answer.text
        return {UUID(item["document_id"]) for item in answer.json()["items"]}

    both, everything = {water.document_id, fire.document_id}, {x.document_id for x in (water, fire, notes)}
    assert await found(state="cancelled") == {notes.document_id}
    assert await found(state="working") == both
    assert await found(stage="parsing") == {fire.document_id}
    assert await found(filename="WATER") == {water.document_id}
    assert await found(filename="%.") == {water.document_id}
    assert await found(filename="_") == {fire.document_id}
    assert await found(filename="\\") == set()
    assert await found(metadata='{"department": "claims"}') == both
    assert await found(metadata='{"department": "claims", "year": 2026}') == {fire.document_id}
    assert await found(metadata='{"tags": ["b"]}') == {notes.document_id}
    assert await found(metadata="{}") == everything
    assert await found(metadata='{"department": "claims"}', filename="pdf", state="working", stage="queued") == {
        water.document_id
    }


BAD_PARAMETERS: list[tuple[dict[str, str], str]] = [
    ({"limit": "0"}, "limit"),
    ({"limit": "101"}, "limit"),
    ({"state": "broken"}, "state"),
    ({"stage": "'; drop"}, "stage"),
    ({"cursor": "AAAA"}, "cursor"),
    ({"filename": ""}, "filename"),
    ({"filename": "a\0b"}, "filename"),
    ({"filename": "x" * 256}, "filename"),
    ({"metadata": "department=claims"}, "metadata"),
    ({"metadata": "[1]"}, "metadata"),
    ({"metadata": "null"}, "metadata"),
    ({"metadata": '{"a": "\\u0000"}'}, "metadata"),
    ({"metadata": '{"a": "\\ud800"}'}, "metadata"),
    ({"metadata": '{"a": NaN}'}, "metadata"),
    ({"metadata": '{"a": 1e999}'}, "metadata"),
    ({"metadata": "[" * 2000}, "metadata"),
    ({"metadata": '{"a": ' + "9" * 3900 + "}"}, "metadata"),
    ({"metadata": '{"a": "' + "x" * 4000 + '"}'}, "metadata"),
]


async def test_a_bad_parameter_is_named(service: LiveService) -> None:
    client = service.client(new_user())
    for query, field in BAD_PARAMETERS:
        answer = await client.get("/api/v2/documents", params=query)
        assert answer.status_code == 400, (query, answer.text)
        error = answer.json()["error"]
        assert error["code"] == "INVALID_ARGUMENT", query
        assert [item["field"] for item in error["details"]["fields"]] == [field], query


async def test_the_text_comes_as_it_is_stored_and_only_when_it_changed(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    added = await add_text(
        admin, service.resources.store, await add_document(admin, service.resources.store, user), TEXT
    )
    client = service.client(user)
    path = f"/api/v2/documents/{added.document_id}/markdown"
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.content == TEXT.encode()
    assert answer.headers["Content-Type"] == "text/markdown; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "private, no-cache"
    tag = answer.headers["ETag"]
    assert tag == f'"{sha256(TEXT.encode()).hexdigest()}"'
    for same in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        unchanged = await client.get(path, headers={"If-None-Match": same})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["ETag"]) == (304, b"", tag), same
    for other in ('"other"', tag.strip('"'), ""):
        assert (await client.get(path, headers={"If-None-Match": other})).status_code == 200, other
    await add_text(admin, service.resources.store, added, TEXT + "More.\n")
    changed = await client.get(path, headers={"If-None-Match": tag})
    assert changed.content == (TEXT + "More.\n").encode()


async def test_a_text_larger_than_a_block_comes_whole_and_a_client_that_leaves_leaves_nothing_open(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    store = service.resources.store
    text = "Ünder the bridge. " * 600_000
    added = await add_text(admin, store, await add_document(admin, store, user), text)
    client = service.client(user)
    path = f"/api/v2/documents/{added.document_id}/markdown"
    assert (await client.get(path)).text == text
    for _ in range(3):
        async with client.stream("GET", path) as answer:
            await anext(answer.aiter_raw(1000))
    async with asyncio.timeout(5):
        while opened(service):
            await asyncio.sleep(0.02)


def opened(service: LiveService) -> list[str]:
    """The objects that this process has open."""
    root = str(service.settings.home / "storage")
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue  # closed meanwhile
    return [link for link in links if link.startswith(root)]


async def test_a_text_that_is_not_there_yet_is_a_conflict_that_says_where_the_job_stands(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    added = await add_document(admin, service.resources.store, user)
    await advance(admin, await claim(admin, added.job_id), "parsing")
    answer = await service.client(user).get(f"/api/v2/documents/{added.document_id}/markdown")
    assert answer.status_code == 409
    error = answer.json()["error"]
    assert error["code"] == "DOCUMENT_NOT_READY"
    assert error["details"] == {
        "document_id": str(added.document_id),
        "job_id": str(added.job_id),
        "state": "working",
        "stage": "parsing",
    }
    await admin.execute("delete from upload_pipeline.upload_jobs")
    answer = await service.client(user).get(f"/api/v2/documents/{added.document_id}/markdown")
    assert answer.json()["error"]["details"] == {"document_id": str(added.document_id)}


async def test_a_text_that_was_lost_is_said_to_be_without_telling_where_it_was(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    added = await add_text(
        admin, service.resources.store, await add_document(admin, service.resources.store, user), TEXT
    )
    await service.resources.store.delete([markdown_key(user, added.document_id, sha256(TEXT.encode()).hexdigest())])
    answer = await service.client(user).get(f"/api/v2/documents/{added.document_id}/markdown")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "OBJECT_MISSING"
    assert "parsed/" not in answer.text


async def test_chunks_come_in_their_order_page_by_page(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    store = service.resources.store
    text = "".join(f"Sentence number {i:02}. " for i in range(20))
    added = await add_text(admin, store, await add_document(admin, store, user), text, chunks=7)
    await add_text(admin, store, await add_document(admin, store, user), "Of another document.", chunks=1)
    # A set that is being made: the same places, not live.
    await admin.execute(
        """
        insert into upload_pipeline.document_chunks
          (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
           section_ids)
        select gen_random_uuid(), document_id, user_id, ordinal, 'not yet', chunk_sha256, 'd', 0, 1, '{}', '{}'
          from upload_pipeline.document_chunks
        """
    )
    client = service.client(user)
    path = f"/api/v2/documents/{added.document_id}/chunks"
    for limit in (1, 3, 7, 100):
        seen: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            page = (await client.get(path, params={"limit": limit} | ({"cursor": cursor} if cursor else {}))).json()
            seen += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert [chunk["ordinal"] for chunk in seen] == list(range(7))
        assert "".join(text[chunk["start"] : chunk["end"]] for chunk in seen) == text
        assert all(chunk["text"] == text[chunk["start"] : chunk["end"]] for chunk in seen)
    first = seen[0]
    assert (first["page_from"], first["page_to"], first["heading_path"]) == (1, 2, ["One"])
    assert UUID(first["chunk_id"])
    assert (await client.get(path, params={"cursor": "999999999"})).json() == {"items": [], "next_cursor": None}
    for bad in ("-1", "x", "9999999999", "1.5"):
        assert (await client.get(path, params={"cursor": bad})).status_code == 400, bad


async def test_a_document_that_is_not_searchable_yet_has_no_chunks(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    added = await add_document(admin, service.resources.store, user)
    answer = await service.client(user).get(f"/api/v2/documents/{added.document_id}/chunks")
    assert (answer.status_code, answer.json()) == (200, {"items": [], "next_cursor": None})


async def test_a_document_of_somebody_else_is_like_none(service: LiveService, admin: asyncpg.Connection) -> None:
    store = service.resources.store
    added = await add_text(admin, store, await add_document(admin, store, new_user()), TEXT, chunks=1)
    stranger = service.client(new_user())
    before = await admin.fetch("select * from upload_pipeline.documents")
    for method, path in [*(("GET", path) for path in READS), ("DELETE", "")]:
        told = []
        for named in (added.document_id, UUID(int=added.document_id.int ^ 1)):
            url = f"/api/v2/documents/{named}{path}"
            answer = await stranger.request(method, url, headers={"X-Correlation-ID": "same"})
            assert answer.status_code == 404, (method, path)
            headers = {name: value for name, value in answer.headers.items() if name != "date"}
            told.append((answer.text.replace(str(named), ""), headers))
        assert told[0] == told[1], (method, path)
    assert await admin.fetch("select * from upload_pipeline.documents") == before
    assert (await stranger.get("/api/v2/documents")).json()["items"] == []


async def test_nothing_shows_a_document_whose_deletion_has_begun(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    store = service.resources.store
    added = await add_text(admin, store, await add_document(admin, store, user), "Of bridges.", chunks=1)
    client = service.client(user)
    url = (await client.get(f"/api/v2/documents/{added.document_id}/download")).json()["download_url"]
    asked = {"query": "bridges", "mode": "text"}
    assert len((await client.post("/api/v2/search", json=asked)).json()["hits"]) == 1
    await admin.execute("select upload_pipeline.begin_deletion($1)", added.document_id)
    for path in READS:
        assert (await client.get(f"/api/v2/documents/{added.document_id}{path}")).status_code == 404, path
    assert (await service.client().get(url)).status_code == 404
    assert (await client.get("/api/v2/documents")).json()["items"] == []
    assert (await client.get("/api/v2/jobs")).json()["items"] == []
    for path in ("", "/events"):
        assert (await client.get(f"/api/v2/jobs/{added.job_id}{path}")).status_code == 404, path
    for verb in ("retry", "cancel"):
        assert (await client.post(f"/api/v2/jobs/{added.job_id}/{verb}")).status_code == 404, verb
    assert (await client.post("/api/v2/search", json=asked)).json()["hits"] == []


@dataclass(frozen=True)
class Late(LocalBackend):
    """A store in which something has happened before the first read."""

    first: Callable[[], Awaitable[object]] | None = None

    async def read(self, key: str, block_bytes: int) -> AsyncGenerator[bytes, None]:
        if self.first is not None:
            await self.first()
        async for block in LocalBackend.read(self, key, block_bytes):
            yield block


@asynccontextmanager
async def late_service(
    service: LiveService, first: Callable[[], Awaitable[object]]
) -> AsyncGenerator[httpx.AsyncClient]:
    """The same service, called without a socket, on the same store where `first` happens before an object is read."""
    store = service.resources.store
    assert isinstance(store.backend, LocalBackend)
    late = replace(service.resources, store=replace(store, backend=Late(store.backend.tree, first=first)))
    transport = httpx.ASGITransport(create_app(service.settings, late))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("path", ["markdown", "bytes"])
async def test_a_document_that_is_deleted_between_the_look_and_the_read_is_like_none(
    service: LiveService, admin: asyncpg.Connection, path: str
) -> None:
    user = new_user()
    store = service.resources.store
    added = await add_text(admin, store, await add_document(admin, store, user), TEXT)
    document = f"/api/v2/documents/{added.document_id}"
    url = (await service.client(user).get(f"{document}/download")).json()["download_url"]

    async def delete() -> None:
        assert (await service.client(user).delete(document)).status_code == 204

    async with late_service(service, delete) as client:
        asked = url if path == "bytes" else f"{document}/markdown"
        answer = await client.get(asked, headers={"Authorization": f"Bearer {token(user)}", "Host": "localhost"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "DOCUMENT_NOT_FOUND"


async def test_a_text_that_is_replaced_between_the_look_and_the_read_is_the_new_one(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    store = service.resources.store
    added = await add_text(admin, store, await add_document(admin, store, user), TEXT)

    async def process_again() -> None:
        await add_text(admin, store, added, "New.\n")
        await store.delete([markdown_key(user, added.document_id, sha256(TEXT.encode()).hexdigest())])

    async with late_service(service, process_again) as client:
        answer = await client.get(
            f"/api/v2/documents/{added.document_id}/markdown", headers={"Authorization": f"Bearer {token(user)}"}
        )
    assert (answer.status_code, answer.text) == (200, "New.\n")
    assert answer.headers["ETag"] == f'"{sha256(answer.content).hexdigest()}"'


async def test_a_document_whose_bytes_are_awaited_is_shown_and_not_downloaded(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user, document = new_user(), uuid4()
    reserved = await reserve_document(
        service.resources.db,
        document_id=document,
        user_id=user,
        filename="later.pdf",
        media_type="application/pdf",
        file_bytes=1000,
        file_sha256="a" * 64,
        raw_key=raw_key(user, document),
        window=timedelta(minutes=20),
        metadata={},
    )
    client = service.client(user)
    (shown,) = (await client.get("/api/v2/documents")).json()["items"]
    assert datetime.fromisoformat(shown["upload_deadline"]) == reserved.deadline
    assert shown["job"]["stage"] == "queued"
    for path in ("download", "markdown"):
        answer = await client.get(f"/api/v2/documents/{document}/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "DOCUMENT_NOT_READY")
    assert (await client.get(f"/api/v2/documents/{document}/chunks")).json()["items"] == []
    # A URL that was handed out for what came before gets nothing either.
    grant = Grant("GET", document, raw_key(user, document), datetime.now(UTC) + timedelta(minutes=1))
    signed = f"/api/v2/documents/{document}/bytes?token={service.resources.signer.sign(grant)}"
    assert (await client.get(signed)).status_code == 404
    assert (await client.delete(f"/api/v2/documents/{document}")).status_code == 204
    assert await admin.fetchval("select count(*) from upload_pipeline.documents") == 0


async def test_metadata_of_any_form_comes_back_as_it_went_in(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    said = {"": None, "deep": {"a": [1, {"b": "漢字 \u2028"}]}, "large": 2**60, "none": None}
    document = uuid4()
    await admin.execute(
        """
        insert into upload_pipeline.documents
          (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata)
        values ($1, $2, 'Grüße „x“.txt', 'text/plain', 1, repeat('a', 64), $3, $4)
        """,
        document,
        user,
        raw_key(user, document),
        json.dumps(said),
    )
    shown = (await service.client(user).get(f"/api/v2/documents/{document}")).json()
    assert (shown["metadata"], shown["filename"], shown["job"]) == (said, "Grüße „x“.txt", None)
