"""Batches over HTTP: taken whole, each file with its own outcome, or refused with nothing left of them."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from job_rows import advance, claim_all
from live_service import LiveService, new_user, running_service, service_settings, token
from raw_requests import connected
from sample_documents import make_document
from upload_traces import Traces

from upload_pipeline.database.queue import fail_job
from upload_pipeline.storage.keys import raw_key

BATCH = "/api/v1/documents/ingest/batch"
MAX_BYTES = 300_000
KINDS = ("pdf", "docx", "txt", "md", "html")
LIMITS = {"max_file_bytes": MAX_BYTES, "api_body_timeout": 0.5, "limit_batch_files_per_day": 1_000_000}


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path, **LIMITS)) as running:
        yield running


@pytest.fixture
def traces(service: LiveService, admin: asyncpg.Connection) -> Traces:
    return Traces(service, admin)


def mixed(count: int = 10) -> list[tuple[str, bytes]]:
    """Files of all kinds, unlike each other."""
    kinds = [KINDS[n % len(KINDS)] for n in range(count)]
    return [(f"{n}.{kind}", make_document(kind, n + 1)) for n, kind in enumerate(kinds)]


def form(files: Sequence[tuple[str, bytes]], mapping: bytes | None = None, name: str = "m.csv") -> list[Any]:
    """The parts of a request, the mapping last."""
    parts: list[Any] = [("files", file) for file in files]
    return parts + ([] if mapping is None else [("metadata_mapping", (name, mapping))])


async def post(service: LiveService, user: UUID, parts: list[Any], **headers: str) -> httpx.Response:
    return await service.client(user).post(BATCH, files=parts, headers=headers)


async def status(service: LiveService, user: UUID, batch: str) -> dict[str, Any]:
    answer = await service.client(user).get(f"{BATCH}/{batch}/status")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


CSV = (
    "\ufefffilename,author,department,date_created,tags,category,case\r\n"
    '0.pdf,Ines Varga,"Claims, West",2026-01-31,"roof,storm",letter,17\r\n'
    "3.md,,Legal,,,,\r\n"
    "nowhere.pdf,x,,,,,\r\n"
).encode()
JSON = json.dumps({"0.pdf": {"author": "Ines Varga", "tags": ["roof"], "case": 17}, "4.html": {"category": "faq"}})


@pytest.mark.parametrize("where", ["mapping first", "mapping last"])
async def test_ten_mixed_files_with_csv_are_a_batch(service: LiveService, traces: Traces, where: str) -> None:
    user, parts = new_user(), form(mixed(), CSV)
    answer = await post(
        service, user, parts[::-1] if where == "mapping first" else parts, **{"X-Correlation-ID": "order-66"}
    )
    assert answer.status_code == 202, answer.text
    told = answer.json()
    assert told == {
        "batch_id": told["batch_id"],
        "total_documents": 10,
        "status": "in_progress",
        "message": "10 files were taken.",
        "status_url": f"{service.url}{BATCH}/{told['batch_id']}/status",
    }
    rows = await traces.admin.fetch(
        "select * from upload_pipeline.documents d join upload_pipeline.upload_jobs j using (document_id)"
    )
    assert await traces.keys() == {raw_key(user, row["document_id"]) for row in rows}
    assert {row["correlation_id"] for row in rows} == {"order-66"}
    metadata = {row["filename"]: json.loads(row["metadata"]) for row in rows}
    assert metadata["0.pdf"] == {
        "author": "Ines Varga",
        "department": "Claims, West",
        "date_created": "2026-01-31",
        "tags": ["roof", "storm"],
        "category": "letter",
        "case": "17",
    }
    assert (metadata["3.md"], metadata["9.html"]) == ({"department": "Legal"}, {})
    seen = await status(service, user, told["batch_id"])
    assert (seen["processed_count"], seen["failed_count"], seen["status"]) == (0, 0, "in_progress")
    assert seen["warnings"] == ["line 4 of the mapping: there is no file 'nowhere.pdf' in the batch"]
    assert seen["estimated_completion_time"] is not None
    assert seen["completed_at"] is None
    events = await traces.admin.fetch("select code, correlation_id, payload from upload_pipeline.events")
    (accepted,) = [row for row in events if row["code"] == "batch_accepted"]
    assert (accepted["correlation_id"], json.loads(accepted["payload"])["total"]) == ("order-66", 10)
    assert not [path for path in await traces.files() if path.startswith("scratch")]


async def test_files_with_json_are_a_batch_whose_metadata_is_kept(service: LiveService, traces: Traces) -> None:
    user = new_user()
    told = (await post(service, user, form(mixed(5), JSON.encode(), "m.json"))).json()
    assert (await status(service, user, told["batch_id"]))["warnings"] == []
    rows = await traces.admin.fetch("select filename, metadata from upload_pipeline.documents")
    metadata = {row["filename"]: json.loads(row["metadata"]) for row in rows}
    assert metadata["0.pdf"] == {"author": "Ines Varga", "tags": ["roof"], "case": "17"}
    assert metadata["4.html"] == {"category": "faq"}


async def test_a_batch_with_nothing_to_wait_for_is_taken_like_others_and_its_status_says_so(
    service: LiveService, traces: Traces
) -> None:
    user = new_user()
    answer = await post(service, user, form([("scan.pdf", b"%PDF-1.7 and no more")]))
    told = answer.json()
    assert (answer.status_code, told["status"]) == (202, "in_progress")
    assert (await status(service, user, told["batch_id"]))["status"] == "failed"


async def test_two_broken_files_make_it_a_partial_failure(
    service: LiveService, traces: Traces, admin: asyncpg.Connection
) -> None:
    user = new_user()
    broken = [("scan.pdf", b"%PDF-1.7 and no more"), ("large.txt", b"w" * (MAX_BYTES + 1))]
    answer = await post(service, user, form([mixed()[0], *broken, mixed()[2]]))
    assert answer.status_code == 202
    told = answer.json()
    assert told["message"] == "4 files were taken. 2 of them were refused; the status says why."
    for job in (await claim_all(admin)).values():
        await advance(admin, job, "embedded")
    seen = await status(service, user, told["batch_id"])
    assert (seen["processed_count"], seen["failed_count"], seen["total_documents"]) == (2, 2, 4)
    assert seen["status"] == "partial_failure"
    assert [(one["filename"], one["code"], one["job_id"]) for one in seen["failed_documents"]] == [
        ("scan.pdf", "CORRUPT_FILE", None),
        ("large.txt", "FILE_TOO_LARGE", None),
    ]
    assert seen["completed_at"] is not None
    assert seen["estimated_completion_time"] is None
    assert len(await traces.keys()) == 2


async def test_more_than_a_hundred_files_are_refused_with_their_number(service: LiveService, traces: Traces) -> None:
    user = new_user()
    files = [(f"{n}.txt", b"file number %d" % n) for n in range(137)]
    for count in (101, 137):
        answer = await post(service, user, form(files[:count], CSV))
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["details"]) == ("BATCH_TOO_LARGE", {"files": count, "max_files": 100})
        assert f"{count} files" in error["message"]
        assert await traces.nothing()
    large = [*files[:100], ("101.txt", bytes(20_000_000))]
    answer = await post(service, user, form(large))
    assert "at least 101 files" in answer.json()["error"]["message"]
    assert await traces.nothing()


def zipped(files: Sequence[tuple[str, bytes]]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(f"folder/{name}", data)
    return made.getvalue()


async def test_an_archive_is_a_batch_too(service: LiveService, traces: Traces) -> None:
    user, data = new_user(), zipped([*mixed(5), (".hidden", b"x"), ("empty.txt", b"")])
    parts = [("archive", ("all.zip", data)), *form([], CSV)]
    answer = await post(service, user, parts)
    assert answer.status_code == 202, answer.text
    seen = await status(service, user, answer.json()["batch_id"])
    assert (seen["total_documents"], seen["failed_count"]) == (6, 1)
    assert seen["failed_documents"][0]["code"] == "EMPTY_FILE"
    assert 'hidden files of the archive were left out: ".hidden"' in seen["warnings"]
    assert len(await traces.keys()) == 5
    assert not [path for path in await traces.files() if path.startswith("scratch")]
    torn = await post(service, new_user(), [("archive", ("all.zip", data[:-30]))])
    assert (torn.status_code, torn.json()["error"]["code"]) == (400, "INVALID_ARCHIVE")


FILE = ("files", ("a.txt", b"plain words"))


@pytest.mark.parametrize(
    ("parts", "code", "said"),
    [
        ([("metadata_mapping", ("m.csv", b"filename\n"))], "INVALID_ARGUMENT", "files"),
        ([FILE, ("metadata_mapping", ("m.csv", b"author\nx\n"))], "INVALID_MAPPING", "line 1, column 1"),
        ([FILE, ("metadata_mapping", ("m.csv", b"filename\n\xff\n"))], "INVALID_MAPPING", "line 2, column 1"),
        ([FILE, ("metadata_mapping", ("m.json", b"[]"))], "INVALID_MAPPING", "object"),
        ([FILE, *[("metadata_mapping", ("m.csv", b"filename\n"))] * 2], "INVALID_ARGUMENT", "more than one"),
        ([FILE, ("metadata_mapping", ("m.csv", b"x" * 10_485_761))], "INVALID_MAPPING", "larger than"),
        ([FILE, ("file", ("b.txt", b"x"))], "INVALID_ARGUMENT", "there is no such part"),
        ([FILE, ("files", (None, b"x"))], "INVALID_ARGUMENT", "no name"),
        ([FILE, ("archive", ("a.zip", b"x"))], "INVALID_ARGUMENT", "no files beside"),
        ([("archive", ("a.zip", b"x")), FILE], "INVALID_ARGUMENT", "an archive already"),
        ([("archive", ("a.zip", b"no archive"))], "INVALID_ARCHIVE", "no ZIP"),
    ],
)
async def test_a_request_that_is_wrong_leaves_nothing(
    service: LiveService, traces: Traces, parts: list[Any], code: str, said: str
) -> None:
    answer = await post(service, new_user(), parts)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert said in json.dumps(error)
    assert await traces.nothing()


async def test_another_type_of_body_and_one_that_is_too_large_are_refused(
    service: LiveService, traces: Traces, database: Any, tmp_path: Path
) -> None:
    client = service.client(new_user())
    answer = await client.post(BATCH, json={"files": []})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "UNSUPPORTED_TYPE")
    settings = service_settings(database.worker_url, tmp_path / "small", **LIMITS, max_batch_bytes=100_000)
    async with running_service(settings) as small:
        too_much = form([(f"{n}.txt", bytes([65 + n]) * 2_800_000) for n in range(4)])
        announced = await post(small, new_user(), too_much)
        assert (announced.status_code, announced.json()["error"]["code"]) == (413, "FILE_TOO_LARGE")
        assert "several batches" in announced.json()["error"]["message"]
    assert await traces.rows() == 0


async def test_a_batch_beyond_the_room_that_there_is_waits_outside(
    service: LiveService, traces: Traces, database: Any, tmp_path: Path
) -> None:
    settings = service_settings(database.worker_url, tmp_path / "full", **LIMITS, max_concurrent_batch_bytes=30_000)
    async with running_service(settings) as full, connected(full.url) as one:
        user = new_user()
        await one.start(
            "POST",
            BATCH,
            Authorization=f"Bearer {token(user)}",
            Content_Type="multipart/form-data; boundary=b",
            Content_Length="25000",
        )
        for _ in range(100):
            if await traces.admin.fetchval("select count(*) from upload_pipeline.admissions"):
                break
            await asyncio.sleep(0.02)
        answer = await post(full, user, form([("a.txt", b"w" * 8_000)]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "CAPACITY")
        assert "Retry-After" in answer.headers
        assert "in smaller batches" in answer.json()["error"]["message"]
        assert answer.json()["error"]["details"] == {}
        one.writer.close()
        for _ in range(100):
            if not await traces.admin.fetchval("select count(*) from upload_pipeline.admissions"):
                break
            await asyncio.sleep(0.02)
        assert (await post(full, user, form([("a.txt", b"w" * 8_000)]))).status_code == 202


async def test_a_client_that_goes_leaves_nothing(service: LiveService, traces: Traces) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%b"\r\n\r\n'
    async with connected(service.url) as connection:
        await connection.start(
            "POST",
            BATCH,
            Authorization=f"Bearer {token(new_user())}",
            Content_Type="multipart/form-data; boundary=b",
            Content_Length="1000000",
        )
        await connection.send(head % b"a.txt" + b"words " * 100 + b"\r\n" + head % b"b.txt" + b"words")
        for _ in range(100):
            if await traces.files():
                break
            await asyncio.sleep(0.02)
        assert await traces.files()
    assert await traces.nothing()


async def test_the_same_batch_again_is_the_same_documents(service: LiveService, traces: Traces) -> None:
    user = new_user()
    first = (await post(service, user, form(mixed(5)))).json()
    again = (await post(service, user, form([*mixed(5), mixed(5)[0]]))).json()
    assert await traces.rows() == 10
    assert first["batch_id"] != again["batch_id"]
    seen = await status(service, user, again["batch_id"])
    assert seen["total_documents"] == 6
    assert '"0.pdf" was sent before: the document stays as it is, with the metadata that it has' in seen["warnings"]
    assert '2 files are named "0.pdf"' in seen["warnings"][0]


async def test_jobs_are_listed_by_their_batch(service: LiveService) -> None:
    user = new_user()
    first = (await post(service, user, form(mixed(3)))).json()["batch_id"]
    await post(service, user, form([("other.txt", b"other words")]))
    client = service.client(user)

    async def jobs(**query: Any) -> list[str]:
        found: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = (await client.get("/api/v2/jobs", params={"limit": 2, **query, **cursor})).json()
            found += [item["job_id"] for item in page["items"]]
            if page["next_cursor"] is None:
                return found
            cursor = {"cursor": page["next_cursor"]}

    assert len(await jobs(batch_id=first)) == 3
    assert set(await jobs(batch_id=first)) < set(await jobs())
    assert len(await jobs(batch_id=first, state="queued")) == 3
    assert await jobs(batch_id=first, state="done") == await jobs(batch_id=uuid4()) == []
    stranger = (await service.client(new_user()).get("/api/v2/jobs", params={"batch_id": first})).json()
    assert stranger["items"] == []


async def test_what_failed_is_retried_and_what_is_open_is_stopped(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    batch = (await post(service, user, form([*mixed(3), ("empty.txt", b"")]))).json()["batch_id"]
    client = service.client(user)
    claimed = list((await claim_all(admin)).values())
    await advance(admin, claimed[0], "embedded")
    await fail_job(admin, claimed[1].lease, code="PARSE_FAILED", message="It does not parse.", retryable=False)
    stopped = await client.delete(f"{BATCH}/{batch}", headers={"X-Correlation-ID": "my-stop"})
    assert stopped.status_code == 200
    assert (stopped.json()["status"], stopped.json()["failed_count"]) == ("in_progress", 2)
    await fail_job(admin, claimed[2].lease, code="PARSE_FAILED", message="It does not parse.", retryable=True)
    seen = await status(service, user, batch)
    assert (seen["status"], seen["processed_count"]) == ("partial_failure", 1)
    assert sorted(one["code"] for one in seen["failed_documents"]) == ["CANCELLED", "EMPTY_FILE", "PARSE_FAILED"]

    retried = (await client.post(f"{BATCH}/{batch}/retry", headers={"X-Correlation-ID": "my-retry"})).json()
    assert (retried["retried"], retried["status"]) == (2, "in_progress")
    told = await admin.fetch(
        """
        select code::text, correlation_id from upload_pipeline.events
         where code in ('job_cancel_requested', 'job_cancelled', 'job_restarted') order by event_id
        """
    )
    assert [tuple(row) for row in told] == [
        ("job_cancel_requested", "my-stop"),
        ("job_cancelled", "my-stop"),
        *[("job_restarted", "my-retry")] * 2,
    ]
    assert [one["filename"] for one in retried["documents"] if not one["retried"]] == ["empty.txt"]
    for job in (await claim_all(admin)).values():
        await advance(admin, job, "embedded")
    seen = await status(service, user, batch)
    assert (seen["processed_count"], seen["failed_count"], seen["status"]) == (3, 1, "partial_failure")


async def test_a_batch_of_somebody_else_is_not_there(service: LiveService) -> None:
    batch = (await post(service, new_user(), form(mixed(1)))).json()["batch_id"]
    stranger = service.client(new_user())
    for found in (batch, uuid4()):
        for method, path in (("GET", "/status"), ("POST", "/retry"), ("DELETE", "")):
            answer = await stranger.request(method, f"{BATCH}/{found}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "BATCH_NOT_FOUND")


async def test_files_of_batches_have_a_limit_of_their_own(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    limits = {**LIMITS, "limit_batch_files_per_day": 4, "limit_uploads_per_day": 1, "limit_uploads_per_minute": 3}
    async with running_service(service_settings(database.worker_url, tmp_path, **limits)) as service:
        user, traces = new_user(), Traces(service, admin)
        refused = await post(service, user, form(mixed(5)))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "RATE_LIMITED")
        assert int(refused.headers["Retry-After"]) > 60
        assert refused.headers["X-RateLimit-Limit"] == "4"
        assert await traces.nothing()
        other = new_user()
        for n in range(3):
            assert (await post(service, other, form([(f"{n}.txt", b"words %d" % n)]))).status_code == 202
        assert (await post(service, other, form([("3.txt", b"more")]))).headers["X-RateLimit-Limit"] == "3"


async def test_a_batch_that_makes_too_many_open_jobs_is_refused(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    async with running_service(service_settings(database.worker_url, tmp_path, **LIMITS, limit_open_jobs=4)) as service:
        user = new_user()
        assert (await post(service, user, form(mixed(3)))).status_code == 202
        answer = await post(service, user, form([("x.txt", b"x words"), ("y.txt", b"y words")]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "TOO_MANY_OPEN_JOBS")
        assert await admin.fetchval("select count(*) from upload_pipeline.documents") == 3
        assert len(await Traces(service, admin).keys()) == 3
        assert (await post(service, user, form([("x.txt", b"x words"), ("empty.txt", b"")]))).status_code == 202


async def test_required_fields_fail_the_files_that_lack_them(database: Any, tmp_path: Path) -> None:
    settings = service_settings(database.worker_url, tmp_path, **LIMITS, batch_required_fields=("department",))
    async with running_service(settings) as service:
        user = new_user()
        seen = await status(service, user, (await post(service, user, form(mixed(2), CSV))).json()["batch_id"])
        assert {one["filename"]: one["code"] for one in seen["failed_documents"]} == {"1.docx": "INVALID_METADATA"}
        assert "department" in seen["failed_documents"][0]["error"]
