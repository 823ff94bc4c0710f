"""Files sent as a form: taken whole, or refused with nothing left of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from live_service import LiveService, new_user, running_service, service_settings, token
from raw_requests import Answer, connected
from sample_documents import make_document
from upload_traces import Traces

from upload_pipeline import ids
from upload_pipeline.storage.keys import raw_key

MAX_BYTES = 300_000
UPLOAD = "/api/v2/upload"
TEXT = b"Plain words, enough of them to be a file.\n"


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(database.worker_url, tmp_path, max_file_bytes=MAX_BYTES, api_body_timeout=0.5)
    async with running_service(settings) as running:
        yield running


@pytest.fixture
def traces(service: LiveService, admin: asyncpg.Connection) -> Traces:
    return Traces(service, admin)


def disposition(name: str, filename: str | None = None) -> str:
    return f'form-data; name="{name}"' + ("" if filename is None else f'; filename="{filename}"')


def form_body(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    """A form of parts: each a Content-Disposition and its bytes."""
    made = b"".join(
        b"--%b\r\nContent-Disposition: %b\r\n\r\n%b\r\n" % (boundary.encode(), head.encode(), data)
        for head, data in parts
    )
    return made + b"--" + boundary.encode() + b"--\r\n"


FILE = (disposition("file", "note.txt"), TEXT)


async def post(service: LiveService, user: UUID, body: bytes, **headers: str) -> httpx.Response:
    given = {"Content-Type": "multipart/form-data; boundary=b", **headers}
    return await service.client(user).post(UPLOAD, content=body, headers=given)


async def test_a_file_of_each_kind_becomes_a_document_with_a_job(service: LiveService, traces: Traces) -> None:
    kept = set()
    for kind in ("pdf", "docx", "txt", "md", "html"):
        user, data = new_user(), make_document(kind, 1)
        answer = await service.client(user, **{"X-Correlation-ID": "order-66"}).post(
            UPLOAD,
            files={"file": (f"../claims/Räumung.{kind}", data)},
            data={"metadata": json.dumps({"tags": ["a"], "department": "claims"})},
        )
        assert answer.status_code == 202
        told = answer.json()
        document = ids.document_id(user, hashlib.sha256(data).hexdigest())
        row = await traces.document(user)
        assert told == {
            "document_id": str(document),
            "job_id": str(row["job_id"]),
            "duplicate": False,
            "status_url": f"{service.url}/api/v2/jobs/{row['job_id']}",
            "upload_url": None,
            "upload_method": None,
            "upload_headers": None,
            "upload_expires_at": None,
        }
        assert (row["document_id"], row["filename"]) == (document, f"Räumung.{kind}")
        assert (row["stage"], row["state"], row["correlation_id"]) == ("queued", "queued", "order-66")
        assert json.loads(row["metadata"]) == {"tags": ["a"], "department": "claims"}
        kept.add(raw_key(user, document))
        assert (await service.client(user).get(told["status_url"])).json()["document_id"] == str(document)
    assert await traces.keys() == kept
    assert set(await traces.files()) == {f"storage/{key}" for key in kept}


async def test_the_same_bytes_again_are_the_first_document(service: LiveService, traces: Traces) -> None:
    user = new_user()
    first = await post(service, user, form_body(FILE))
    second = await post(service, user, form_body((disposition("file", "other.txt"), TEXT)))
    assert (first.status_code, second.status_code) == (202, 200)
    assert second.json() == {**first.json(), "duplicate": True}
    assert (await traces.document())["filename"] == "note.txt"
    assert len(await traces.files()) == 1
    other = await post(service, new_user(), form_body(FILE))
    assert (other.status_code, other.json()["duplicate"]) == (202, False)
    assert await traces.uploads_counted() == {("multipart", "accepted"): 2, ("multipart", "duplicate"): 1}


async def test_the_same_bytes_many_times_at_once_are_one_document(service: LiveService, traces: Traces) -> None:
    user = new_user()
    answers = await asyncio.gather(*(post(service, user, form_body(FILE)) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [202]
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert await traces.rows() == 2
    assert len(await traces.files()) == 1


async def test_metadata_count_before_and_after_the_file_and_as_a_file_of_their_own(
    service: LiveService, traces: Traces
) -> None:
    said = {"department": "claims", "pages": 3, "ok": True, "tags": ["ä", "b"]}
    metadata = (disposition("metadata"), json.dumps(said).encode())
    blob = (disposition("metadata", "blob") + "\r\nContent-Type: application/json", json.dumps(said).encode())
    for parts in ([metadata, FILE], [FILE, metadata], [FILE, blob]):
        user = new_user()
        answer = await post(service, user, form_body(*parts))
        assert answer.status_code == 202
        kept = await traces.admin.fetchval(
            "select metadata from upload_pipeline.documents where document_id = $1", answer.json()["document_id"]
        )
        assert json.loads(kept) == said


REFUSED: dict[str, tuple[bytes, int, str, str]] = {
    "no file": (form_body((disposition("metadata"), b"{}")), 400, "INVALID_ARGUMENT", "file"),
    "an empty form": (b"--b--\r\n", 400, "INVALID_ARGUMENT", "file"),
    "no body": (b"", 400, "INVALID_ARGUMENT", "body"),
    "no form": (b"plain bytes", 400, "INVALID_ARGUMENT", "body"),
    "a file without a name": (form_body((disposition("file"), TEXT)), 400, "INVALID_ARGUMENT", "file"),
    "no file chosen": (form_body((disposition("file", ""), b"")), 400, "INVALID_ARGUMENT", "file"),
    "two files": (form_body(FILE, FILE), 400, "INVALID_ARGUMENT", "file"),
    "an unknown part": (form_body(FILE, (disposition("files"), b"x")), 400, "INVALID_ARGUMENT", "files"),
    "metadata twice": (
        form_body((disposition("metadata"), b"{}"), FILE, (disposition("metadata"), b"{}")),
        400,
        "INVALID_ARGUMENT",
        "metadata",
    ),
    "metadata that are no JSON": (
        form_body(FILE, (disposition("metadata"), b"{")),
        400,
        "INVALID_METADATA",
        "metadata",
    ),
    "metadata that are no object": (
        form_body(FILE, (disposition("metadata"), b"[1]")),
        400,
        "INVALID_METADATA",
        "metadata",
    ),
    "metadata that nest without end": (
        form_body(FILE, (disposition("metadata"), b"[" * 60_000)),
        400,
        "INVALID_METADATA",
        "metadata",
    ),
    "metadata that cannot be kept": (
        form_body(FILE, (disposition("metadata"), b'{"a": 1, "b": {"c": 1}}')),
        400,
        "INVALID_METADATA",
        "metadata.b",
    ),
    "metadata beyond their limit": (
        form_body(FILE, (disposition("metadata"), b'{"a": "' + b"x" * 70_000 + b'"}')),
        400,
        "INVALID_ARGUMENT",
        "metadata",
    ),
    "another boundary": (form_body(FILE, boundary="c"), 400, "INVALID_ARGUMENT", "body"),
    "a body that breaks off": (form_body(FILE)[:-6], 400, "INVALID_ARGUMENT", "body"),
    "bytes after the end": (form_body(FILE) + b"more", 400, "INVALID_ARGUMENT", "body"),
}


async def test_a_form_that_is_none_is_refused_with_its_field_named_and_nothing_left(
    service: LiveService, traces: Traces
) -> None:
    for case, (body, status, code, field) in REFUSED.items():
        for content in (body, chunked(body)):
            answer = await post(service, new_user(), content)  # type: ignore[arg-type]
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code), (case, error)
            assert [item["field"] for item in error["details"]["fields"]] == [field], case
            assert await traces.nothing(), case


async def chunked(body: bytes, size: int = 97) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), size):
        yield body[begin : begin + size]


async def test_a_header_without_a_boundary_is_named(service: LiveService, traces: Traces) -> None:
    answer = await post(service, new_user(), form_body(FILE), **{"Content-Type": "multipart/form-data"})
    assert (answer.status_code, answer.json()["error"]["details"]["fields"][0]["field"]) == (400, "Content-Type")
    assert await traces.nothing()


async def test_another_type_of_body_is_told_which_are_taken(service: LiveService, traces: Traces) -> None:
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=b"):
        answer = await post(service, new_user(), form_body(FILE), **{"Content-Type": kind})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (415, "UNSUPPORTED_TYPE"), kind
        assert error["details"]["taken"] == ["multipart/form-data", "application/json"]
    assert await traces.nothing()


async def test_a_file_that_cannot_be_processed_is_refused_with_nothing_left(
    service: LiveService, traces: Traces
) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + b"\0" * 100
    for filename, data, status, code in (
        ("empty.txt", b"", 400, "EMPTY_FILE"),
        ("picture.png", picture, 415, "UNSUPPORTED_TYPE"),
        ("picture.pdf", picture, 415, "TYPE_MISMATCH"),
        ("broken.pdf", b"%PDF-1.7\nnothing more", 400, "CORRUPT_FILE"),
    ):
        answer = await post(service, new_user(), form_body((disposition("file", filename), data)))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert await traces.nothing(), filename
    assert await traces.uploads_counted() == {("multipart", "refused"): 4}


async def test_an_announced_body_that_is_too_large_is_refused_before_it_comes(
    service: LiveService, traces: Traces
) -> None:
    async with connected(service.url) as connection:
        await connection.start("POST", UPLOAD, **sender(new_user()), Content_Length=str(MAX_BYTES + 1_000_000))
        answer = await connection.answer()  # to the head alone: none of the body is ever sent
        assert too_large(answer)
        assert await connection.closed()
    assert await traces.nothing()


def sender(user: UUID) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user)}", "Content_Type": "multipart/form-data; boundary=b"}


def too_large(answer: Answer) -> bool:
    told = (answer.status, answer.error["code"], answer.error["details"]["max_bytes"], answer.headers["connection"])
    return told == (413, "FILE_TOO_LARGE", MAX_BYTES, "close")


async def test_a_body_that_turns_out_too_large_is_cut_off(service: LiveService, traces: Traces) -> None:
    sent = 0
    async with connected(service.url) as connection:
        await connection.start("POST", UPLOAD, **sender(new_user()), Transfer_Encoding="chunked")
        await connection.chunk(f"--b\r\nContent-Disposition: {FILE[0]}\r\n\r\n".encode())
        answering = asyncio.create_task(connection.answer())
        try:
            async with asyncio.timeout(10):
                while True:
                    await connection.chunk(b"word " * 10_000)
                    sent += 50_000
                    await asyncio.sleep(0)
        except OSError:
            pass  # closed
        assert too_large(await answering)
    assert sent > MAX_BYTES
    assert await traces.nothing()


@pytest.mark.parametrize(("size", "status"), [(MAX_BYTES, 202), (MAX_BYTES + 1, 413)])
async def test_the_limit_is_that_of_the_file_alone(
    service: LiveService, traces: Traces, size: int, status: int
) -> None:
    metadata = (disposition("metadata"), json.dumps({"a": "x" * 16_000}).encode())
    data = (b"words and words\n" * size)[:size]
    answer = await post(service, new_user(), form_body((disposition("file", "a.txt"), data), metadata))
    assert answer.status_code == status
    if status == 413:
        assert answer.json()["error"]["details"]["max_bytes"] == MAX_BYTES
        assert await traces.nothing()


async def test_a_client_that_goes_away_leaves_nothing(
    service: LiveService, traces: Traces, capsys: pytest.CaptureFixture[str]
) -> None:
    for gone, sent in enumerate((0, 10, 90, 100_000), 1):
        async with connected(service.url) as connection:
            await connection.start("POST", UPLOAD, **sender(new_user()), Content_Length="200000")
            await connection.send(form_body((FILE[0], b"word " * 30_000))[:sent])
            if sent > 90:
                while not await traces.files():
                    await asyncio.sleep(0.01)
            else:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            while await traces.uploads_counted() != {("multipart", "aborted"): gone}:
                await asyncio.sleep(0.05)
        assert await traces.nothing()
    assert "request_failed" not in "".join(capsys.readouterr())


async def test_a_client_that_stops_sending_is_let_go(service: LiveService, traces: Traces) -> None:
    async def stop_after(sent: int) -> None:
        async with connected(service.url) as connection:
            await connection.start("POST", UPLOAD, **sender(new_user()), Content_Length="200000")
            await connection.send(form_body((FILE[0], b"word " * 30_000))[:sent])
            answer = await connection.answer()
            assert (answer.status, answer.error["code"]) == (408, "REQUEST_TIMEOUT")
            assert await connection.closed()

    await asyncio.gather(*(stop_after(sent) for sent in (0, 90, 100_000)))
    assert await traces.nothing()


async def test_a_client_that_sends_ever_so_slowly_is_let_go_in_the_end(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    settings = service_settings(database.worker_url, tmp_path, upload_url_seconds=0.5, upload_finish_seconds=0.5)
    async with running_service(settings) as service, connected(service.url) as connection:
        await connection.start("POST", UPLOAD, **sender(new_user()), Transfer_Encoding="chunked")
        answering = asyncio.create_task(connection.answer())
        body = form_body((FILE[0], b"word " * 1000))
        for begin in range(0, len(body), 100):
            if answering.done():
                break
            await connection.chunk(body[begin : begin + 100])
            await asyncio.sleep(0.05)
        answer = await answering
        assert (answer.status, answer.error["code"]) == (408, "REQUEST_TIMEOUT")
        assert "did not end within 1 s" in answer.error["message"]
        assert await Traces(service, admin).nothing()


async def test_where_clients_reach_the_service_is_a_setting(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    settings = service_settings(database.worker_url, tmp_path, api_public_url="https://api.example.com/docs-in/")
    async with running_service(settings) as service:
        told = (await post(service, new_user(), form_body(FILE))).json()
        assert told["status_url"] == f"https://api.example.com/docs-in/api/v2/jobs/{told['job_id']}"


async def test_a_sender_that_asks_first_is_told_before_it_sends(service: LiveService, traces: Traces) -> None:
    body = form_body(FILE)
    async with connected(service.url) as connection:
        await connection.start(
            "POST", UPLOAD, **sender(new_user()), Content_Length=str(MAX_BYTES * 9), Expect="100-continue"
        )
        assert too_large(await connection.answer())
    async with connected(service.url) as connection:
        await connection.start(
            "POST", UPLOAD, **sender(new_user()), Content_Length=str(len(body)), Expect="100-continue"
        )
        assert (await connection.answer()).status == 100
        await connection.send(body)
        assert (await connection.answer()).status == 202


async def test_nobody_sends_without_credentials(service: LiveService, traces: Traces) -> None:
    answer = await service.client().post(UPLOAD, files={"file": ("a.txt", TEXT)})
    assert answer.status_code == 401
    assert await traces.nothing()
