"""Files that are announced first: what is answered, where the bytes may go, and what becomes of wrong ones."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from live_service import LiveService, new_user, running_service, service_settings, token
from raw_requests import connected
from upload_traces import Traces

from upload_pipeline import ids
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.signed_urls import Grant

MAX_BYTES = 300_000
UPLOAD = "/api/v2/upload"
TEXT = b"Plain words, enough of them to be a file.\n" * 20
SHA256 = hashlib.sha256(TEXT).hexdigest()
ANNOUNCED = {"filename": "note.txt", "bytes_len": len(TEXT), "mime": "text/plain", "sha256": SHA256}


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(
        database.worker_url,
        tmp_path,
        max_file_bytes=MAX_BYTES,
        api_body_timeout=0.5,
        cors_origins=("https://app.example.com",),
    )
    async with running_service(settings) as running:
        yield running


@pytest.fixture
def traces(service: LiveService, admin: asyncpg.Connection) -> Traces:
    return Traces(service, admin)


async def announce(service: LiveService, user: UUID, **changes: Any) -> httpx.Response:
    body = {name: value for name, value in {**ANNOUNCED, **changes}.items() if value is not None}
    return await service.client(user).post(UPLOAD, json=body)


async def put(service: LiveService, told: dict[str, Any], data: bytes = TEXT, **headers: str) -> httpx.Response:
    return await service.client().put(told["upload_url"], content=data, headers={**told["upload_headers"], **headers})


async def test_a_file_is_announced_sent_and_there(service: LiveService, traces: Traces) -> None:
    user = new_user()
    before = datetime.now(UTC)
    answer = await announce(service, user, metadata={"department": "claims"}, sha256=SHA256.upper())
    assert answer.status_code == 202
    told = answer.json()
    document = ids.document_id(user, SHA256)
    row = await traces.document()
    assert told["document_id"] == str(document)
    assert told["job_id"] == str(row["job_id"])
    assert (told["duplicate"], told["upload_method"]) == (False, "PUT")
    assert told["upload_headers"] == {"Content-Type": "text/plain"}
    assert told["upload_url"].startswith(f"{service.url}/api/v2/upload/{document}/bytes?token=")
    assert told["status_url"] == f"{service.url}/api/v2/jobs/{row['job_id']}"
    expires_at = datetime.fromisoformat(told["upload_expires_at"])
    assert timedelta(seconds=898) < expires_at - before <= timedelta(seconds=901)
    assert row["upload_deadline"] > expires_at + timedelta(seconds=290)
    assert json.loads(row["metadata"]) == {"department": "claims"}
    assert (row["filename"], row["user_id"], row["state"]) == ("note.txt", user, "queued")
    assert await traces.files() == []

    sent = await put(service, told)
    assert (sent.status_code, sent.content) == (204, b"")
    row = await traces.document()
    assert row["upload_deadline"] is None
    assert await traces.files() == [f"storage/{raw_key(user, document)}"]
    assert await traces.service.resources.store.get_bytes(raw_key(user, document), MAX_BYTES) == TEXT
    # as often as one likes
    for _ in range(2):
        assert (await put(service, told)).status_code == 204
    assert await traces.files() == [f"storage/{raw_key(user, document)}"]
    assert await traces.uploads_counted() == {("json", "accepted"): 1, ("bytes", "accepted"): 3}


async def test_what_was_sent_before_is_a_duplicate_whichever_way_it_came(service: LiveService, traces: Traces) -> None:
    user = new_user()
    whole = await service.client(user).post(UPLOAD, files={"file": ("a.txt", TEXT)})
    again = await announce(service, user)
    assert again.status_code == 200
    assert again.json() == {**whole.json(), "duplicate": True}
    assert again.json()["upload_url"] is None
    other = new_user()
    told = (await announce(service, other)).json()
    assert (await put(service, told)).status_code == 204
    form = await service.client(other).post(UPLOAD, files={"file": ("b.txt", TEXT)})
    assert (form.status_code, form.json()["document_id"], form.json()["duplicate"]) == (200, told["document_id"], True)


async def test_announcing_again_what_has_not_come_gives_another_url_for_the_same_document(
    service: LiveService, traces: Traces
) -> None:
    user = new_user()
    first = (await announce(service, user)).json()
    second = (await announce(service, user, filename="renamed.txt")).json()
    assert (second["document_id"], second["job_id"]) == (first["document_id"], first["job_id"])
    assert second["duplicate"] is False
    assert (await traces.document())["filename"] == "renamed.txt"
    for told in (first, second):
        assert (await put(service, told)).status_code == 204


async def test_a_form_brings_what_was_announced(service: LiveService, traces: Traces) -> None:
    user = new_user()
    told = (await announce(service, user)).json()
    form = await service.client(user).post(UPLOAD, files={"file": ("b.txt", TEXT)})
    assert (form.status_code, form.json()["document_id"], form.json()["job_id"]) == (
        202,
        told["document_id"],
        told["job_id"],
    )
    assert (await traces.document())["upload_deadline"] is None
    assert (await put(service, told)).status_code == 204


NONE: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"filename": None}, 400, "INVALID_ARGUMENT", "filename"),
    ({"filename": ""}, 400, "INVALID_ARGUMENT", "filename"),
    ({"filename": 7}, 400, "INVALID_ARGUMENT", "filename"),
    ({"bytes_len": None}, 400, "INVALID_ARGUMENT", "bytes_len"),
    ({"bytes_len": 0}, 400, "INVALID_ARGUMENT", "bytes_len"),
    ({"bytes_len": -1}, 400, "INVALID_ARGUMENT", "bytes_len"),
    ({"bytes_len": 10**30}, 400, "INVALID_ARGUMENT", "bytes_len"),
    ({"bytes_len": MAX_BYTES + 1}, 413, "FILE_TOO_LARGE", None),
    ({"sha256": None}, 400, "INVALID_ARGUMENT", "sha256"),
    ({"sha256": "ab" * 31}, 400, "INVALID_ARGUMENT", "sha256"),
    ({"sha256": "xy" * 32}, 400, "INVALID_ARGUMENT", "sha256"),
    ({"mime": "image/png", "filename": "a.png"}, 415, "UNSUPPORTED_TYPE", None),
    ({"mime": "application/pdf", "filename": "a.txt"}, 415, "TYPE_MISMATCH", None),
    ({"metadata": []}, 400, "INVALID_ARGUMENT", "metadata"),
    ({"metadata": {"a": {"b": 1}}}, 400, "INVALID_METADATA", "metadata.a"),
    ({"metadata": {"a": "x" * 17_000}}, 400, "INVALID_METADATA", "metadata.a"),
    ({"project_id": "none"}, 400, "INVALID_ARGUMENT", "project_id"),
    (
        {"project_id": str(uuid4()), "metadata": {"project_id": "another"}},
        400,
        "INVALID_METADATA",
        "metadata.project_id",
    ),
    ({"size": 5}, 400, "INVALID_ARGUMENT", "size"),
]


async def test_an_announcement_that_is_none_is_refused_and_reserves_nothing(
    service: LiveService, traces: Traces
) -> None:
    for changes, status, code, field in NONE:
        answer = await announce(service, new_user(), **changes)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), error
        if field is not None:
            assert [item["field"] for item in error["details"]["fields"]] == [field]
        if code == "FILE_TOO_LARGE":
            assert error["details"]["max_bytes"] == MAX_BYTES
    assert await traces.nothing()


async def test_a_body_that_is_no_json_object_is_refused(service: LiveService, traces: Traces) -> None:
    client = service.client(new_user())
    for body in (b"", b"{", b"[]", b"\xff", b"null", b'{"a"' * 20_000, b"[" * 100_000):
        answer = await client.post(UPLOAD, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_ARGUMENT"), body[:10]
    assert await traces.nothing()


async def test_an_announcement_is_not_held_in_memory_without_bound(service: LiveService, traces: Traces) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 65536

    for content in (b" " * (1024 * 1025), endless()):
        answer = await service.client(new_user()).post(
            UPLOAD,
            content=content,
            headers={"Content-Type": "application/json"},  # type: ignore[arg-type]
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "FILE_TOO_LARGE")
    assert await traces.nothing()


async def test_a_project_is_kept_with_the_metadata(service: LiveService, traces: Traces) -> None:
    project = uuid4()
    answer = await announce(service, new_user(), project_id=str(project), metadata={"a": 1})
    assert answer.status_code == 202
    assert json.loads((await traces.document())["metadata"]) == {"a": 1, "project_id": str(project)}


async def test_other_bytes_are_refused_nothing_is_kept_and_the_right_ones_can_still_come(
    service: LiveService, traces: Traces
) -> None:
    told = (await announce(service, new_user())).json()
    for wrong in (TEXT[:-2] + b"!\n", b"\x89PNG\r\n\x1a\n".ljust(len(TEXT), b"\0")):
        answer = await put(service, told, wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "CHECKSUM_MISMATCH")
        assert await traces.files() == []
    assert (await traces.document())["upload_deadline"] is not None
    assert (await put(service, told)).status_code == 204


async def test_bytes_that_are_not_what_their_announcement_calls_them_are_refused(
    service: LiveService, traces: Traces
) -> None:
    data = b"\x89PNG\r\n\x1a\n" + b"\0" * 500
    announced = {"bytes_len": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    told = (await announce(service, new_user(), **announced, filename="a.pdf", mime="application/pdf")).json()
    answer = await put(service, told, data)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "TYPE_MISMATCH")
    assert await traces.files() == []


async def test_headers_are_those_that_were_granted(service: LiveService, traces: Traces) -> None:
    told = (await announce(service, new_user())).json()

    async def unannounced() -> AsyncIterator[bytes]:
        yield TEXT

    without_length = await put(service, told, unannounced())  # type: ignore[arg-type]
    assert (without_length.status_code, without_length.json()["error"]["code"]) == (411, "LENGTH_REQUIRED")
    for data in (b"", TEXT[:-1], TEXT + b"x", TEXT * 1000):
        answer = await put(service, told, data)
        assert (answer.status_code, answer.json()["error"]["details"]["fields"][0]["field"]) == (400, "Content-Length")
    for kind in ("text/html", "application/octet-stream", ""):
        answer = await put(service, told, **{"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]["details"]["fields"][0]["field"]) == (400, "Content-Type")
    assert await traces.files() == []
    assert (await put(service, told, **{"Content-Type": "Text/Plain; charset=utf-8"})).status_code == 204


async def test_a_url_is_for_one_method_one_document_and_a_while(service: LiveService, traces: Traces) -> None:
    user = new_user()
    told = (await announce(service, user)).json()
    address = urlsplit(told["upload_url"])
    (signed,) = parse_qs(address.query)["token"]
    client = service.client(user, **told["upload_headers"])
    signer, document = service.resources.signer, UUID(told["document_id"])
    good = signer.verify(signed, method="PUT", now=datetime.now(UTC))
    past = datetime.now(UTC) - timedelta(seconds=1)

    async def ask(path: str, given: str | None) -> tuple[int, str]:
        answer = await client.put(path, content=TEXT, params=None if given is None else {"token": given})
        return answer.status_code, answer.json()["error"]["code"]

    invalid = (403, "SIGNED_URL_INVALID")
    assert await ask(address.path, None) == (400, "INVALID_ARGUMENT")
    assert await ask(address.path, signed[:-1]) == invalid
    assert await ask(address.path, "x" * 9000) == (400, "INVALID_ARGUMENT")
    assert await ask(address.path.replace(told["document_id"], str(uuid4())), signed) == invalid
    assert await ask(address.path, signer.sign(Grant("GET", document, good.key, good.expires_at))) == invalid
    # a permission of another kind, as of another version of this service
    assert await ask(address.path, signer.sign(Grant("PUT", document, good.key, good.expires_at))) == invalid
    expired = signer.sign(Grant("PUT", document, good.key, past, good.file_bytes, good.media_type, good.file_sha256))
    assert await ask(address.path, expired) == (403, "SIGNED_URL_EXPIRED")
    fetched = await client.get(f"/api/v2/documents/{document}/bytes", params={"token": signed})
    assert (fetched.status_code, fetched.json()["error"]["code"]) == invalid
    assert await traces.files() == []


async def test_a_document_that_was_deleted_takes_no_bytes(service: LiveService, traces: Traces) -> None:
    user = new_user()
    told = (await announce(service, user)).json()
    assert (await service.client(user).delete(f"/api/v2/documents/{told['document_id']}")).status_code < 300
    answer = await put(service, told)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "DOCUMENT_NOT_FOUND")
    assert await traces.nothing()


@pytest.mark.parametrize("stays", [True, False])
async def test_bytes_that_stop_coming_leave_nothing_and_can_be_sent_again(
    service: LiveService, traces: Traces, stays: bool
) -> None:
    data = b"word " * 40_000
    announced = {"bytes_len": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    told = (await announce(service, new_user(), **announced)).json()
    address = urlsplit(told["upload_url"])
    async with connected(service.url) as connection:
        await connection.start(
            "PUT", f"{address.path}?{address.query}", Content_Length=str(len(data)), Content_Type="text/plain"
        )
        await connection.send(data[:150_000])
        if stays:
            answer = await connection.answer()
            assert (answer.status, answer.error["code"]) == (408, "REQUEST_TIMEOUT")
        else:
            while not await traces.files():
                await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        while await traces.files():
            await asyncio.sleep(0.05)
    assert (await traces.document())["upload_deadline"] is not None
    assert (await put(service, told, data)).status_code == 204


async def test_an_upload_that_began_in_time_has_a_while_to_end_and_no_longer(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    # the URL's end is told in whole seconds, and so comes up to one early
    settings = service_settings(database.worker_url, tmp_path, upload_url_seconds=1, upload_finish_seconds=2.0)
    async with running_service(settings) as service:
        told = (await announce(service, new_user())).json()
        address = urlsplit(told["upload_url"])
        begun, ending = time.monotonic(), datetime.fromisoformat(told["upload_expires_at"])

        async def trickle(seconds: float) -> int:
            async with connected(service.url) as connection:
                headers = {"Content_Length": str(len(TEXT)), "Content_Type": "text/plain"}
                await connection.start("PUT", f"{address.path}?{address.query}", **headers)
                answering = asyncio.create_task(connection.answer())
                pieces = 16
                step = -(-len(TEXT) // pieces)
                for begin in range(0, len(TEXT), step):
                    if answering.done():
                        break
                    await connection.send(TEXT[begin : begin + step])
                    await asyncio.sleep(seconds / pieces)
                return (await answering).status

        late, in_time = await asyncio.gather(trickle(9), trickle(1.2))
        assert datetime.now(UTC) > ending
        assert (late, in_time) == (408, 204)
        assert time.monotonic() - begun < 8
        assert (await put(service, told)).json()["error"]["code"] == "SIGNED_URL_EXPIRED"


async def test_sending_bytes_is_bounded_too(database: Any, tmp_path: Path, admin: asyncpg.Connection) -> None:
    settings = service_settings(database.worker_url, tmp_path, limit_upload_tries_per_minute=2)
    async with running_service(settings) as service:
        told = (await announce(service, new_user())).json()
        answers = [await put(service, told) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [204, 204, 429]
        assert int(answers[2].headers["Retry-After"]) >= 1
        assert answers[2].headers["X-RateLimit-Limit"] == "2"
        # each file by itself, and a token that is none counts for nobody
        other = (await announce(service, new_user())).json()
        assert (await put(service, {**other, "upload_url": other["upload_url"][:-1]})).status_code == 403
        assert (await put(service, other)).status_code == 204


async def test_a_browser_may_send_from_another_origin(service: LiveService) -> None:
    told = (await announce(service, new_user())).json()
    origin = {"Origin": "https://app.example.com"}
    asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"}
    preflight = await service.client().options(told["upload_url"], headers={**origin, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert "PUT" in preflight.headers["Access-Control-Allow-Methods"]
    sent = await put(service, told, **origin)
    assert (sent.status_code, sent.headers["Access-Control-Allow-Origin"]) == (204, "https://app.example.com")


async def test_the_url_is_where_clients_reach_the_service_and_stands_in_no_log(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = service_settings(database.worker_url, tmp_path, api_public_url="https://api.example.com")
    async with running_service(settings) as service:
        told = (await announce(service, new_user())).json()
        assert told["upload_url"].startswith("https://api.example.com/api/v2/upload/")
        address = urlsplit(told["upload_url"])
        local = {**told, "upload_url": f"{service.url}{address.path}?{address.query}"}
        assert (await put(service, local)).status_code == 204
        signed = parse_qs(address.query)["token"][0]
        lines = "".join(capsys.readouterr())
        assert "/api/v2/upload/{document_id}/bytes" in lines
        assert signed not in lines


async def complete(service: LiveService, user: UUID, document: object) -> httpx.Response:
    return await service.client(user).post(f"{UPLOAD}/{document}/complete")


async def test_saying_that_the_bytes_are_there_is_only_true_when_they_are(service: LiveService, traces: Traces) -> None:
    user = new_user()
    told = (await announce(service, user)).json()
    early = await complete(service, user, told["document_id"])
    assert (early.status_code, early.json()["error"]["code"]) == (409, "OBJECT_MISSING")
    assert (await traces.document())["upload_deadline"] is not None
    assert (await put(service, told)).status_code == 204
    for _ in range(3):
        answer = await complete(service, user, told["document_id"])
        assert answer.status_code == 200
        assert answer.json() == {
            "document_id": told["document_id"],
            "job_id": told["job_id"],
            "stage": "queued",
            "state": "queued",
            "status_url": told["status_url"],
        }
    assert (await complete(service, user, "none")).status_code == 400


async def test_bytes_that_came_past_the_service_are_looked_for_at_once(service: LiveService, traces: Traces) -> None:
    """As with a bucket, where the service does not see the PUT."""
    user = new_user()
    told = (await announce(service, user)).json()
    later = datetime.now(UTC) + timedelta(minutes=5)
    await traces.admin.execute(
        "update upload_pipeline.upload_jobs set state = 'retryable', run_at = $2 where job_id = $1",
        UUID(told["job_id"]),
        later,
    )
    await service.resources.store.put_bytes(raw_key(user, UUID(told["document_id"])), TEXT)
    assert (await complete(service, user, told["document_id"])).status_code == 200
    ready = await traces.admin.fetchval(
        "select state = 'queued' and run_at <= now() from upload_pipeline.upload_jobs where job_id = $1",
        UUID(told["job_id"]),
    )
    assert ready
    # the bytes were not looked at yet: that is for the job
    assert (await traces.document())["upload_deadline"] is not None


async def test_nobody_completes_what_is_somebody_elses(service: LiveService) -> None:
    told = (await announce(service, new_user())).json()
    theirs = await complete(service, new_user(), told["document_id"])
    missing = await complete(service, new_user(), uuid4())
    assert theirs.status_code == missing.status_code == 404
    assert theirs.json()["error"]["code"] == missing.json()["error"]["code"] == "DOCUMENT_NOT_FOUND"


async def test_a_file_that_was_announced_counts_as_an_upload(database: Any, tmp_path: Path) -> None:
    settings = service_settings(database.worker_url, tmp_path, limit_uploads_per_minute=2)
    async with running_service(settings) as service:
        user = new_user()
        assert (await announce(service, user)).status_code == 202
        form = {"files": {"file": ("a.txt", b"other words")}}
        headers = {"Authorization": f"Bearer {token(user)}"}
        assert (await service.client().post(UPLOAD, headers=headers, **form)).status_code == 202
        assert (await announce(service, user)).status_code == 429
