"""The history over HTTP: whole pages, exact totals, the caller's own only, and no row that can break it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from tests.api.job_rows import add_job, advance, claim
from tests.api.live_service import LiveService, new_user, running_service, service_settings
from upload_pipeline.database import queue
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.history import HistoryFilter, HistorySort, list_history
from upload_pipeline.stages import JobState, Stage, shown_status

PATH = "/api/ingestion/history"
FIELDS = {"id", "filename", "file_size", "mime_type", "status", "uploaded_at", "completed_at", "error", "download_url"}
START = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


async def ask(service: LiveService, user: UUID, **parameters: Any) -> dict[str, Any]:
    answer = await service.client(user).get(PATH, params=parameters)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


async def upload(admin: asyncpg.Connection, user: UUID, filename: str, *, minute: int = 0, size: int = 100) -> UUID:
    """A queued upload of so many minutes after START; the document's id."""
    job = await add_job(admin, user, filename=filename, file_bytes=size)
    document: UUID = await admin.fetchval(
        """
        update upload_pipeline.documents d set created_at = $2 from upload_pipeline.upload_jobs j
         where j.job_id = $1 and d.document_id = j.document_id returning d.document_id
        """,
        job,
        START + timedelta(minutes=minute),
    )
    return document


def names(page: dict[str, Any]) -> list[str]:
    return [item["filename"] for item in page["items"]]


async def test_an_upload_is_told_from_its_arrival_to_its_end(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user, file_bytes=321)

    async def one() -> dict[str, Any]:
        page = await ask(service, user)
        assert (page["total"], page["page"], page["page_size"]) == (1, 1, 20)
        item: dict[str, Any] = page["items"][0]
        assert item.keys() == FIELDS
        return item

    waiting = await one()
    assert (waiting["filename"], waiting["file_size"], waiting["mime_type"]) == ("paper.txt", 321, "text/plain")
    assert (waiting["status"], waiting["completed_at"], waiting["error"]) == ("pending", None, None)
    assert waiting["uploaded_at"].endswith("Z")
    claimed = await claim(admin, job)
    assert (await one())["status"] == "processing"
    await queue.fail_job(admin, claimed.lease, code="PARSE_FAILED", message="again", retryable=True)
    assert ((await one())["status"], (await one())["error"]) == ("pending", None)
    await admin.execute("update upload_pipeline.upload_jobs set run_at = now()")
    assert await queue.promote_due(admin, limit=10) == 1
    await advance(admin, await claim(admin, job), "embedded")
    done = await one()
    assert (done["status"], done["error"]) == ("completed", None)
    assert done["completed_at"] >= done["uploaded_at"]
    await queue.retry_job(admin, job, from_stage="chunking")
    again = await one()
    assert (again["status"], again["completed_at"]) == ("processing", None)


async def test_what_failed_says_why(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    failed, cancelled = await add_job(admin, user, filename="failed"), await add_job(admin, user, filename="cancelled")
    lease = (await claim(admin, failed)).lease
    await queue.fail_job(admin, lease, code="ENCRYPTED", message="It has a password.", retryable=False)
    await admin.execute("select upload_pipeline.cancel_job($1)", cancelled)
    await admin.execute("select upload_pipeline.reap_expired()")
    await admin.execute(
        "update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 s' where state = 'working'"
    )
    await admin.execute("select upload_pipeline.reap_expired()")
    items = {item["filename"]: item for item in (await ask(service, user, status="failed"))["items"]}
    assert items["failed"]["error"] == {"code": "ENCRYPTED", "message": "It has a password."}
    assert items["cancelled"]["error"]["code"] == "CANCELLED"
    assert all(item["completed_at"] for item in items.values())


async def test_the_view_and_the_program_say_the_same(admin: asyncpg.Connection) -> None:
    await add_job(admin, new_user())
    for state, stage in itertools.product(JobState, Stage):
        await admin.execute(
            """
            update upload_pipeline.upload_jobs
               set state = $1::text::upload_pipeline.job_state, stage = $2,
                   worker_id = case when $1 = 'working' then gen_random_uuid() end,
                   lease_expires_at = case when $1 = 'working' then now() end,
                   finished_at = case when $1 in ('done', 'deadletter', 'cancelled') then now() end
            """,
            state,
            stage,
        )
        for awaited in (False, True):
            await admin.execute(
                "update upload_pipeline.documents set upload_deadline = case when $1 then now() end", awaited
            )
            said = await admin.fetchval("select status from upload_pipeline.upload_history")
            assert said == shown_status(state, stage, awaited=awaited), (state, stage, awaited)


async def test_pages_hold_each_upload_once_and_the_total_is_exact(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user, other = new_user(), new_user()
    for number in range(23):
        # several at one moment: the order within it is nevertheless one order
        await upload(admin, user, f"paper {number}", minute=number // 5)
    await upload(admin, other, "not yours")
    pages = [await ask(service, user, page=number, page_size=5) for number in range(1, 7)]
    assert [page["total"] for page in pages] == [23] * 6
    assert [len(page["items"]) for page in pages] == [5, 5, 5, 5, 3, 0]
    seen = [item["id"] for page in pages for item in page["items"]]
    assert len(set(seen)) == 23
    times = [item["uploaded_at"] for page in pages for item in page["items"]]
    assert times == sorted(times, reverse=True)
    assert (await ask(service, other))["total"] == 1
    assert (await ask(service, new_user())) == {"items": [], "page": 1, "page_size": 20, "total": 0}


async def test_a_range_begins_with_its_first_moment_and_ends_before_its_last(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    for minute in range(4):
        await upload(admin, user, str(minute), minute=minute)

    async def within(**parameters: Any) -> list[str]:
        return sorted(names(await ask(service, user, **parameters)))

    at = [(START + timedelta(minutes=minute)).isoformat() for minute in range(4)]
    assert await within(**{"from": at[1]}) == ["1", "2", "3"]
    assert await within(to=at[2]) == ["0", "1"]
    assert await within(**{"from": at[1], "to": at[3]}) == ["1", "2"]
    assert await within(**{"from": at[1], "to": at[1]}) == []
    # without a zone it is UTC, with one it is converted
    assert await within(**{"from": "2026-03-01T12:03:00"}) == ["3"]
    assert await within(**{"from": "2026-03-01T14:03:00+02:00"}) == ["3"]
    assert await within(**{"from": "2026-03-01", "to": "2026-03-02"}) == ["0", "1", "2", "3"]


async def test_a_name_is_found_by_any_part_of_it_in_any_case_and_nothing_is_a_wildcard(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    for filename in ("100% Done.pdf", "100 done.pdf", "a_b.txt", "aXb.txt", "Müller.docx", r"back\slash.md", "it's.md"):
        await upload(admin, user, filename)

    async def found(part: str) -> list[str]:
        page = await ask(service, user, filename=part)
        assert page["total"] == len(page["items"])
        return sorted(names(page))

    assert await found("DONE") == ["100 done.pdf", "100% Done.pdf"]
    assert await found("%") == ["100% Done.pdf"]
    assert await found("_") == ["a_b.txt"]
    assert await found("\\") == [r"back\slash.md"]
    assert await found("mÜLLER") == ["Müller.docx"]
    assert await found("mu\u0308ller") == ["Müller.docx"]
    assert await found("'") == ["it's.md"]
    assert await found("' or true --") == []


async def test_every_order_is_kept_in_both_directions(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    files = [("b.txt", 3, 30), ("A.txt", 1, 20), ("c.txt", 2, 10)]
    for filename, minute, size in files:
        await upload(admin, user, filename, minute=minute, size=size)
    jobs = await admin.fetch(
        "select job_id, filename from upload_pipeline.upload_jobs join upload_pipeline.documents using (document_id)"
    )
    of = {row["filename"]: row["job_id"] for row in jobs}
    await advance(admin, await claim(admin, of["A.txt"]), "embedded")
    await admin.execute("update upload_pipeline.documents set created_at = created_at - interval '1 year'")
    await admin.execute(
        "update upload_pipeline.upload_jobs set state = 'cancelled', worker_id = null, lease_expires_at = null, "
        "finished_at = now() where job_id = $1",
        of["b.txt"],
    )
    expected = {
        "uploaded_at": ["A.txt", "c.txt", "b.txt"],
        "filename": ["A.txt", "b.txt", "c.txt"],
        "file_size": ["c.txt", "A.txt", "b.txt"],
        "status": ["c.txt", "A.txt", "b.txt"],
    }
    for sort, order in expected.items():
        assert names(await ask(service, user, sort=sort)) == order, sort
        assert names(await ask(service, user, sort=f"-{sort}")) == order[::-1], sort
    assert names(await ask(service, user)) == expected["uploaded_at"][::-1]
    # restrictions come together
    assert names(await ask(service, user, sort="status", status="failed", filename=".TXT")) == ["b.txt"]
    assert names(await ask(service, user, status="completed", page_size=1)) == ["A.txt"]
    assert await ask(service, user, status="pending") == {"items": [], "page": 1, "page_size": 20, "total": 0}


BAD = (
    ("page=0", "page"),
    ("page=1000001", "page"),
    ("page=x", "page"),
    ("page_size=0", "page_size"),
    ("page_size=101", "page_size"),
    ("from=yesterday", "from"),
    ("to=2026-13-01", "to"),
    ("from=0001-01-01T00:00:00%2B14:00", "from"),
    ("from=2026-01-02&to=2026-01-01", "from"),
    ("status=done", "status"),
    ("filename=", "filename"),
    ("filename=%00", "filename"),
    (f"filename={'x' * 256}", "filename"),
    ("sort=user_id", "sort"),
    ("sort=filename;drop", "sort"),
)


async def test_a_bad_parameter_is_named(service: LiveService) -> None:
    client = service.client(new_user())
    for query, field in BAD:
        answer = await client.get(f"{PATH}?{query}")
        assert answer.status_code == 400, query
        error = answer.json()["error"]
        assert error["code"] == "INVALID_ARGUMENT"
        assert [problem["field"] for problem in error["details"]["fields"]] == [field], query


async def test_a_row_that_does_not_validate_is_left_out_and_logged(
    service: LiveService, admin: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    user = new_user()
    for filename in ("good", "line\nbreak", "odd type", "before its time", "odd place"):
        await upload(admin, user, filename)
    await admin.execute("update upload_pipeline.documents set media_type = 'nonsense' where filename = 'odd type'")
    await admin.execute("update upload_pipeline.documents set raw_key = '../away' where filename = 'odd place'")
    await admin.execute(
        """
        update upload_pipeline.upload_jobs j set state = 'done', finished_at = d.created_at - interval '1 day'
          from upload_pipeline.documents d where d.document_id = j.document_id and d.filename = 'before its time'
        """
    )
    capsys.readouterr()
    page = await ask(service, user)
    assert names(page) == ["good"]
    assert page["total"] == 5
    said = [line for line in capsys.readouterr().out.splitlines() if "history_row_left_out" in line]
    assert len(said) == 4


async def test_the_bytes_are_fetched_by_the_url_once_they_have_come(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    client = service.client(user)
    await client.post("/api/v2/upload", files={"file": ("note.txt", b"what was sent", "text/plain")})
    url = (await ask(service, user))["items"][0]["download_url"]
    assert (await service.client().get(url)).content == b"what was sent"
    await admin.execute("update upload_pipeline.documents set upload_deadline = now() + interval '1 minute'")
    assert (await ask(service, user))["items"][0]["download_url"] is None


async def test_deleted_documents_are_not_told(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    document = await upload(admin, user, "gone")
    await upload(admin, user, "here")
    await admin.fetch("select upload_pipeline.begin_deletion($1)", document)
    assert names(await ask(service, user)) == ["here"]
    assert (await ask(service, user))["total"] == 1
    assert (await ask(service, user, status="failed"))["total"] == 0


async def test_nobody_reads_it_without_credentials(service: LiveService) -> None:
    answer: httpx.Response = await service.client().get(PATH)
    assert answer.status_code == 401


@pytest.mark.slow
async def test_a_hundred_thousand_uploads_of_one_user_among_others(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    for owner, count in ((user, 100_000), (new_user(), 200_000)):
        await admin.execute(
            """
            insert into upload_pipeline.documents
              (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, created_at)
            select gen_random_uuid(), $1::uuid, 'Report ' || md5(i::text) || ' of Müller ' || i || '.pdf',
                   'application/pdf', 1000 + i, encode(sha256((i || $1::uuid::text)::bytea), 'hex'), gen_random_uuid(),
                   now() - i * interval '7 seconds'
              from generate_series(1, $2) i
            """,
            owner,
            count,
        )
    await admin.execute(
        """
        insert into upload_pipeline.upload_jobs
          (document_id, user_id, pipeline, stage, pool, state, finished_at, created_at)
        select document_id, user_id, 'document', 'embedded', 'default',
               case when file_bytes % 10 = 0 then 'deadletter' else 'done' end::upload_pipeline.job_state, now(),
               created_at
          from upload_pipeline.documents
        """
    )
    await admin.execute("vacuum analyze upload_pipeline.documents")
    await admin.execute("vacuum analyze upload_pipeline.upload_jobs")
    took: dict[str, float] = {}
    for name, wanted, sort, total in (
        ("newest", HistoryFilter(), HistorySort.UPLOADED_AT, 100_000),
        ("name", HistoryFilter(filename="müller 77"), HistorySort.UPLOADED_AT, 1_111),
        ("by name", HistoryFilter(), HistorySort.FILENAME, 100_000),
        ("failed", HistoryFilter(status="failed"), HistorySort.UPLOADED_AT, 10_000),
    ):
        async with as_user(service.resources.db, user) as connection:
            started = time.monotonic()
            page = await list_history(connection, wanted, limit=20, offset=0, sort=sort)
            took[name] = time.monotonic() - started
        assert (page.total, len(page.rows)) == (total, 20)
    print(json.dumps(took))
    assert max(took.values()) < 3
    async with as_user(service.resources.db, user) as connection:
        plan = await connection.fetch(
            "explain select count(*) from upload_pipeline.documents d "
            "where d.created_at > now() - interval '1 day' and strpos(lower(d.filename), 'müller 77') > 0"
        )
    told = "\n".join(row[0] for row in plan)
    assert "documents_listing" in told
    assert "Index Cond: ((user_id = (InitPlan 1).col1) AND (created_at > " in told
