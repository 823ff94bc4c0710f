"""LlamaParse's messages: only what is signed is read, and whatever it says, no more than a look comes of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.api.job_rows import add_job, advance, claim
from tests.api.live_service import LiveService, new_user, running_service, service_settings
from tests.simulators.llama_cloud_wire import sign
from upload_pipeline.providers.llamaparse_webhook import MAX_BYTES, ended_parse

SECRET = "a secret that LlamaParse signs with, for tests"
URL = "/api/v2/webhooks/llamaparse"


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(database.worker_url, tmp_path, llamaparse_webhook_secret=SECRET)
    async with running_service(settings) as running:
        yield running


def message(parse_id: str, event: str = "parse.success", **more: Any) -> dict[str, Any]:
    return {"event_id": "evt-1", "event_type": event, "timestamp": 1795273200, "data": {"job_id": parse_id}, **more}


async def tell(service: LiveService, body: object, *, signature: str | bytes | None = None) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    signed = sign(raw, SECRET) if signature is None else signature
    headers = {b"LC-Signature": signed if isinstance(signed, bytes) else signed.encode()}
    return await service.client().post(URL, content=raw, headers=headers)


async def waiting_job(admin: asyncpg.Connection, parse_id: str) -> Any:
    """A job that waits for the next look at its parse."""
    job = await add_job(admin, new_user())
    lease = await claim(admin, job)
    await advance(admin, lease, "parsing")
    await admin.execute(
        """
        with made as (
          insert into upload_pipeline.parse_submissions
            (document_id, user_id, provider, tier, version, begun_at, parse_id, submitted_at)
          select document_id, user_id, 'llamaparse', 'fast', '2026-06-15', now(), $2, now()
            from upload_pipeline.upload_jobs where job_id = $1
          returning *)
        update upload_pipeline.documents d
           set parse_provider = m.provider, parse_id = m.parse_id, parse_tier = m.tier, parse_version = m.version,
               parse_submitted_at = m.submitted_at
          from made m where m.document_id = d.document_id
        """,
        job,
        parse_id,
    )
    await admin.execute(
        """
        select upload_pipeline.snooze_job(job_id, lease_token, '1 hour') from upload_pipeline.upload_jobs
         where job_id = $1
        """,
        job,
    )
    return job


async def state(admin: asyncpg.Connection, job: Any) -> str:
    found: str = await admin.fetchval("select state::text from upload_pipeline.upload_jobs where job_id = $1", job)
    return found


@pytest.mark.parametrize("nested", [False, True], ids=["json", "string"])
async def test_a_message_in_either_format_wakes_its_job_and_no_other(
    service: LiveService, admin: asyncpg.Connection, nested: bool
) -> None:
    job, other = await waiting_job(admin, "pjb-1"), await waiting_job(admin, "pjb-2")
    body: object = message("pjb-1")
    answer = await tell(service, json.dumps(body) if nested else body)
    assert (answer.status_code, answer.content) == (204, b"")
    assert (await state(admin, job), await state(admin, other)) == ("queued", "retryable")


async def test_messages_that_come_again_late_and_out_of_order_change_nothing_more(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    job = await waiting_job(admin, "pjb-1")
    for event in ("parse.running", "parse.pending"):
        assert (await tell(service, message("pjb-1", event))).status_code == 204
    assert await state(admin, job) == "retryable"
    for event in ("parse.error", "parse.success", "parse.success", "parse.running"):
        assert (await tell(service, message("pjb-1", event))).status_code == 204
    assert await state(admin, job) == "queued"
    events = await admin.fetchval("select count(*) from upload_pipeline.events where code = 'job_promoted'")
    assert events == 1
    await admin.execute(
        "update upload_pipeline.upload_jobs set state = 'done', finished_at = now() where job_id = $1", job
    )
    assert (await tell(service, message("pjb-1"))).status_code == 204
    assert await state(admin, job) == "done"


@pytest.mark.parametrize(
    "body",
    [
        message("pjb-nobody"),
        message(""),
        message("pjb\0"),
        message("\ud800"),
        {},
        [],
        None,
        7,
        "no json",
        "7",
        b"{",
        b"\xff",
        b"[" * 30_000,
        {"data": []},
    ],
)
async def test_what_tells_nothing_is_answered_like_what_tells_something(
    service: LiveService, admin: asyncpg.Connection, body: Any
) -> None:
    job = await waiting_job(admin, "pjb-1")
    answer = await tell(service, body)
    assert (answer.status_code, answer.content) == (204, b"")
    assert await state(admin, job) == "retryable"


async def test_what_is_not_signed_by_the_secret_changes_nothing(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    job = await waiting_job(admin, "pjb-1")
    raw = json.dumps(message("pjb-1")).encode()
    good = sign(raw, SECRET)
    for signature in (
        "",
        "sha256=",
        good[:-1],
        good.replace("sha256=", ""),
        sign(raw, SECRET + "x"),
        "sha256=" + "0" * 64,
        "é",
    ):
        answer = await tell(service, raw, signature=signature)
        assert answer.status_code == 403, signature
        assert answer.json()["error"]["code"] == "FORBIDDEN"
        assert good not in answer.text
    # of another body
    assert (await tell(service, message("pjb-1", "parse.error"), signature=good)).status_code == 403
    assert await state(admin, job) == "retryable"


async def test_a_message_that_is_too_large_is_not_read(service: LiveService) -> None:
    answer = await tell(service, message("pjb-1", padding="x" * MAX_BYTES))
    assert answer.status_code == 413
    assert (await tell(service, message("pjb-1", padding="x" * (MAX_BYTES - 500)))).status_code == 204


def test_the_names_of_an_id_that_are_understood() -> None:
    for body in (
        {"data": {"id": "p"}},
        {"job_id": "p"},
        {"jobId": "p", "data": "x"},
        {"id": "e", "data": {"job_id": "p"}},
    ):
        assert ended_parse(json.dumps(body).encode()) == "p"
    assert ended_parse(json.dumps({"type": "parse.running", "job_id": "p"}).encode()) is None
