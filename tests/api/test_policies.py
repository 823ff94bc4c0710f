"""Policies: taken from those who may, whole and with what they are, or refused with nothing left; and followed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from clamd_server import INFECTED, SIGNATURE
from job_rows import add_job, advance, claim
from live_service import LiveService, new_user, running_service, service_settings, token
from policy_forms import INGEST, PDF, SAID, manager, send
from raw_requests import connected
from sample_documents import make_document
from upload_traces import Traces

from upload_pipeline.database import queue

MAX_BYTES = 300_000


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(
        database.worker_url, tmp_path, max_policy_bytes=MAX_BYTES, max_file_bytes=1000, api_body_timeout=0.5
    )
    async with running_service(settings) as running:
        yield running


@pytest.fixture
def traces(service: LiveService, admin: asyncpg.Connection) -> Traces:
    return Traces(service, admin)


async def status(service: LiveService, user: UUID, job: object) -> dict[str, Any]:
    answer = await service.client(user).get(f"{INGEST}/status/{job}")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def said_of(admin: asyncpg.Connection) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policy's row, and the metadata of its document."""
    row = await admin.fetchrow(
        "select p.*, d.metadata from upload_pipeline.policies p join upload_pipeline.documents d using (document_id)"
    )
    return {name: row[name] for name in ("insurer", "product_name", "launch_date")}, json.loads(row["metadata"])


@pytest.mark.parametrize("role", ["ADMIN", "FP_MANAGER"])
async def test_a_policy_is_answered_as_the_contract_says(service: LiveService, traces: Traces, role: str) -> None:
    user = new_user()
    answer = await service.client().post(
        INGEST,
        files={"file": ("home plus.PDF", PDF)},
        data={**SAID, "insurer": "  Acme Mutual "},
        headers=manager(user, role),
    )
    assert answer.status_code == 202, answer.text
    told = answer.json()
    row = await traces.document()
    assert told == {
        "job_id": str(row["job_id"]),
        "document_id": str(row["document_id"]),
        "status": "pending",
        "estimated_completion_time": told["estimated_completion_time"],
        "estimated_completion_minutes": 1,
        "status_url": f"{service.url}{INGEST}/status/{row['job_id']}",
    }
    expected = datetime.fromisoformat(told["estimated_completion_time"])
    assert timedelta(0) < expected - datetime.now(UTC) <= timedelta(seconds=60)
    assert (row["user_id"], row["filename"], row["media_type"]) == (user, "home plus.PDF", "application/pdf")
    assert (row["file_bytes"], row["stage"], row["state"]) == (len(PDF), "queued", "queued")
    assert await traces.keys() == {row["raw_key"]}
    policy, metadata = await said_of(traces.admin)
    assert policy == {"insurer": "Acme Mutual", "product_name": "Home Plus", "launch_date": date(2026, 2, 28)}
    assert metadata == SAID
    assert (await service.client(user).get(told["status_url"])).status_code == 200
    assert await traces.uploads_counted() == {("multipart", "accepted"): 1}


async def test_the_same_policy_again_is_the_first_job_with_what_is_said_now(
    service: LiveService, traces: Traces
) -> None:
    user = new_user()
    first = (await send(service, user)).json()
    again = await send(service, user, filename="other.pdf", insurer="Acme Mutual AG", launch_date="2026-03-01")
    assert again.status_code == 200
    assert (again.json()["job_id"], again.json()["status"]) == (first["job_id"], "pending")
    policy, metadata = await said_of(traces.admin)
    assert policy == {"insurer": "Acme Mutual AG", "product_name": "Home Plus", "launch_date": date(2026, 3, 1)}
    assert metadata == {**SAID, "insurer": "Acme Mutual AG", "launch_date": "2026-03-01"}
    assert (await traces.document())["filename"] == "home plus.pdf"
    assert len(await traces.files()) == 1
    other = await send(service, new_user())
    assert other.status_code == 202
    assert other.json()["job_id"] != first["job_id"]


async def test_a_document_that_was_there_becomes_a_policy(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    user = new_user()
    async with running_service(service_settings(database.worker_url, tmp_path)) as service:
        plain = await service.client(user).post(
            "/api/v2/upload", files={"file": ("a.pdf", PDF)}, data={"metadata": '{"department": "claims"}'}
        )
        assert (await service.client(user).get(f"{INGEST}/status/{plain.json()['job_id']}")).status_code == 404
        answer = await send(service, user)
        assert answer.status_code == 200
        assert answer.json()["job_id"] == plain.json()["job_id"]
        assert (await said_of(admin))[1] == {"department": "claims", **SAID}
        assert (await status(service, user, plain.json()["job_id"]))["status"] == "pending"


async def test_the_same_policy_many_times_at_once_is_one(service: LiveService, traces: Traces) -> None:
    user = new_user()
    answers = await asyncio.gather(*(send(service, user) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [202]
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert await traces.rows() == 2
    assert len(await traces.files()) == 1


NO_ROLE: tuple[dict[str, Any], ...] = (
    {},
    {"app_metadata": {"roles": ["USER", "admin"]}},
    {"user_metadata": {"roles": ["ADMIN"]}},
    {"roles": ["ADMIN"]},
    {"app_metadata": {"role": "ADMIN"}},
)


async def test_without_the_role_the_answer_comes_before_the_body(service: LiveService, traces: Traces) -> None:
    for claims in NO_ROLE:
        async with connected(service.url) as connection:
            await connection.start(
                "POST",
                INGEST,
                Authorization=f"Bearer {token(new_user(), **claims)}",
                Content_Type="multipart/form-data; boundary=b",
                Content_Length="200000",
            )
            answer = await connection.answer()
        assert (answer.status, answer.error["code"]) == (403, "FORBIDDEN"), claims
        assert answer.error["details"] == {"roles": ["ADMIN", "FP_MANAGER"]}
    assert await traces.nothing()


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.pdf", b"", "EMPTY_FILE"),
    "text named so": ("a.pdf", b"just text", "TYPE_MISMATCH"),
    "a picture named so": ("a.pdf", b"\x89PNG\r\n\x1a\n" + bytes(100), "TYPE_MISMATCH"),
    "not named so": ("a.txt", PDF, "UNSUPPORTED_TYPE"),
    "with no extension": ("a", PDF, "UNSUPPORTED_TYPE"),
    "named so only in the middle": ("a.pdf.docx", PDF, "UNSUPPORTED_TYPE"),
    "another kind": ("a.docx", make_document("docx", 1), "UNSUPPORTED_TYPE"),
    "broken": ("a.pdf", b"%PDF-1.7\nnothing more", "CORRUPT_FILE"),
    "too large": ("a.pdf", PDF + bytes(MAX_BYTES + 1 - len(PDF)), "FILE_TOO_LARGE"),
    "far too large": ("a.pdf", PDF + bytes(MAX_BYTES * 2), "FILE_TOO_LARGE"),
}


async def test_a_bad_file_is_400_with_the_reason_and_leaves_nothing(service: LiveService, traces: Traces) -> None:
    for case, (filename, data, code) in BAD_FILES.items():
        answer = await send(service, new_user(), data, filename=filename)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, code), (case, error)
        if code == "FILE_TOO_LARGE":
            assert error["details"]["max_bytes"] == MAX_BYTES
            assert "MAX_FILE_BYTES" not in error["message"]
        assert await traces.nothing(), case
    assert await traces.admin.fetchval("select count(*) from upload_pipeline.policies") == 0


async def test_a_policy_of_exactly_the_limit_is_taken(service: LiveService) -> None:
    # behind the end of a PDF there may be anything
    assert (await send(service, new_user(), PDF + b"\n" * (MAX_BYTES - len(PDF)))).status_code == 202


async def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(
    service: LiveService, traces: Traces
) -> None:
    async with connected(service.url) as connection:
        headers = {"Content_Type": "multipart/form-data; boundary=b", "Content_Length": str(MAX_BYTES + 100_000)}
        await connection.start("POST", INGEST, **manager(new_user()), **headers)
        answer = await connection.answer()  # to the head alone: none of the body is ever sent
    assert (answer.status, answer.error["code"]) == (400, "FILE_TOO_LARGE")
    assert await traces.nothing()


BAD_FIELDS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "no insurer": ({"insurer": None}, ["insurer"]),
    "nothing said": (dict.fromkeys(SAID), ["insurer", "product_name", "launch_date"]),
    "an empty insurer": ({"insurer": " "}, ["insurer"]),
    "a long product": ({"product_name": "x" * 201}, ["product_name"]),
    "a very long product": ({"product_name": "x" * 100_000}, ["product_name"]),
    "a line break": ({"insurer": "Acme\nMutual"}, ["insurer"]),
    "a NUL": ({"insurer": "Acme\0"}, ["insurer"]),
    "no such day": ({"launch_date": "2026-02-29"}, ["launch_date"]),
    "year zero": ({"launch_date": "0000-01-01"}, ["launch_date"]),
    "a week": ({"launch_date": "2026-W01-1"}, ["launch_date"]),
    "no hyphens": ({"launch_date": "20260228"}, ["launch_date"]),
    "a moment": ({"launch_date": "2026-02-28T00:00:00Z"}, ["launch_date"]),
    "another order": ({"launch_date": "28.02.2026"}, ["launch_date"]),
    "other digits": ({"launch_date": "٢٠٢٦-٠٢-٢٨"}, ["launch_date"]),
    "an unknown part": ({"tariff": "x"}, ["tariff"]),
}


async def test_what_is_said_must_be_whole_and_each_fault_is_named(service: LiveService, traces: Traces) -> None:
    for case, (changed, fields) in BAD_FIELDS.items():
        answer = await send(service, new_user(), **changed)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "INVALID_ARGUMENT"), (case, error)
        assert [item["field"] for item in error["details"]["fields"]] == fields, case
        assert await traces.nothing(), case


async def test_what_is_said_may_come_before_the_file_and_be_in_any_script(service: LiveService, traces: Traces) -> None:
    said = {**SAID, "insurer": "保険" * 100}
    parts = [(name, (None, value.encode())) for name, value in said.items()]
    for order in ([*parts, ("file", ("a.pdf", PDF))], [("file", ("a.pdf", PDF)), *parts[::-1]]):
        user = new_user()
        answer = await service.client().post(INGEST, files=order, headers=manager(user))  # type: ignore[arg-type]
        assert answer.status_code == 202, answer.text
    assert {row["insurer"] for row in await traces.admin.fetch("select insurer from upload_pipeline.policies")} == {
        said["insurer"]
    }


async def test_bytes_that_are_no_text_are_refused(service: LiveService, traces: Traces) -> None:
    parts = [("insurer", (None, b"\xff\xfe")), ("file", ("a.pdf", PDF))]
    answer = await service.client().post(INGEST, files=parts, headers=manager(new_user()))  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]["details"]["fields"][0]["field"]) == (400, "insurer")
    assert await traces.nothing()


async def test_another_body_than_a_form_is_refused(service: LiveService, traces: Traces) -> None:
    for given in ({"json": SAID}, {"content": b"x"}, {"data": SAID}):
        answer = await service.client().post(INGEST, headers=manager(new_user()), **given)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["details"]["taken"]) == (415, ["multipart/form-data"])
    assert await traces.nothing()


async def test_an_infected_policy_is_refused_with_the_name_of_what_it_has(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, clamd_url: str
) -> None:
    async with running_service(service_settings(database.worker_url, tmp_path, clamd_url=clamd_url)) as service:
        answer = await send(service, new_user(), PDF + INFECTED)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["details"]["signature"]) == (400, "MALWARE_FOUND", SIGNATURE)
        assert await Traces(service, admin).nothing()
        plain = await service.client(new_user()).post("/api/v2/upload", files={"file": ("a.txt", INFECTED)})
        assert (plain.status_code, plain.json()["error"]["code"]) == (400, "MALWARE_FOUND")
        assert await Traces(service, admin).nothing()
        assert (await send(service, new_user())).status_code == 202


async def test_limits_of_uploads_and_of_looks_hold_here_too(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    settings = service_settings(
        database.worker_url, tmp_path, limit_uploads_per_minute=2, limit_status_reads_per_minute=3
    )
    async with running_service(settings) as service:
        user = new_user()
        answers = [await send(service, user) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 200, 429]
        url = answers[0].json()["status_url"]
        looks = [(await service.client(user).get(url)).status_code for _ in range(4)]
        assert looks == [200, 200, 200, 429]
    capped = service_settings(database.worker_url, tmp_path / "2", limit_open_jobs=1)
    async with running_service(capped) as service:
        answer = await send(service, user, PDF + b"\n")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "TOO_MANY_OPEN_JOBS")


async def policy_job(admin: asyncpg.Connection, user: UUID) -> UUID:
    job = await add_job(admin, user, filename="policy.pdf")
    await admin.execute(
        """
        insert into upload_pipeline.policies (document_id, user_id, insurer, product_name, launch_date)
        select document_id, user_id, 'A', 'B', '2026-01-01' from upload_pipeline.upload_jobs where job_id = $1
        """,
        job,
    )
    return job


async def test_the_status_follows_stage_and_state_to_the_end(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await policy_job(admin, user)
    told = await status(service, user, job)
    assert set(told) == {
        *("job_id", "status", "progress", "results", "error_message", "created_at", "updated_at", "completed_at"),
        "estimated_completion_time",
    }
    assert (told["status"], told["progress"], told["completed_at"]) == ("pending", 0, None)
    assert told["results"] == {"nodes_created": 0, "edges_created": 0, "errors": []}
    assert told["estimated_completion_time"] is not None

    claimed = await claim(admin, job)
    assert (await status(service, user, job))["status"] == "processing"
    await advance(admin, claimed, "parsed")
    told = await status(service, user, job)
    assert (told["status"], told["progress"]) == ("processing", 30)

    # handed back between two stages: nobody works on it, and it is not pending any more
    await queue.release_jobs(admin, [claimed.lease])
    assert (await status(service, user, job))["status"] == "processing"

    claimed = await claim(admin, job)
    await fail(admin, claimed, retryable=True)
    told = await status(service, user, job)
    assert (told["status"], told["error_message"], told["completed_at"]) == ("processing", None, None)
    assert told["results"]["errors"] == [{"code": "PARSE_TIMEOUT", "message": "it took too long"}]

    await admin.execute("update upload_pipeline.upload_jobs set run_at = now() - interval '1 s'")
    await queue.promote_due(admin)
    claimed = await claim(admin, job)
    await advance(admin, claimed, "embedded")
    told = await status(service, user, job)
    assert (told["status"], told["progress"], told["error_message"]) == ("completed", 100, None)
    assert told["results"]["errors"] == []
    assert told["completed_at"] == told["updated_at"] >= told["created_at"]
    assert told["estimated_completion_time"] is None


async def fail(admin: asyncpg.Connection, claimed: Any, *, retryable: bool) -> None:
    await queue.fail_job(
        admin, claimed.lease, code="PARSE_TIMEOUT", message="it took too long", details={}, retryable=retryable
    )


async def test_a_policy_that_is_given_up_or_cancelled_has_failed_and_says_why(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await policy_job(admin, user)
    await fail(admin, await claim(admin, job), retryable=False)
    told = await status(service, user, job)
    assert (told["status"], told["error_message"]) == ("failed", "it took too long")
    assert told["results"]["errors"] == [{"code": "PARSE_TIMEOUT", "message": "it took too long"}]
    assert told["completed_at"] is not None

    other = await policy_job(admin, user)
    await queue.cancel_job(admin, other)
    told = await status(service, user, other)
    assert (told["status"], told["error_message"]) == ("failed", "The job was cancelled.")


async def test_the_status_of_somebody_elses_policy_of_a_plain_document_and_of_nothing_are_alike(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    policy, plain = await policy_job(admin, user), await add_job(admin, user)
    for asker, job in ((new_user(), policy), (user, plain), (user, uuid4())):
        answer = await service.client(asker).get(f"{INGEST}/status/{job}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "JOB_NOT_FOUND")
