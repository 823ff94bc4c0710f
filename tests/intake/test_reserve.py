"""Files that are announced before their bytes come."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import asyncpg
import pytest
from announced import DATA, WINDOW, reserve, row_of
from failing_parts import HookedDatabase, raising

from upload_pipeline import ids
from upload_pipeline.database import documents, queue
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file
from upload_pipeline.intake.staging import Terms
from upload_pipeline.media_types import MARKDOWN, PDF
from upload_pipeline.storage.keys import raw_key


async def test_an_announced_file_is_a_document_with_a_job_and_no_object(intake, user, traces):
    before = datetime.now(UTC)
    digest = sha256(DATA).hexdigest()
    reserved = await reserve(
        intake, user, filename="../x/Cläim.pdf", file_sha256=digest.upper(), metadata={"a": 1}, priority=3
    )
    assert not reserved.duplicate
    assert reserved.document_id == ids.document_id(user, digest)
    assert reserved.raw_key == raw_key(user, reserved.document_id)
    assert reserved.media_type == PDF
    assert reserved.deadline is not None
    assert before + WINDOW - timedelta(seconds=2) <= reserved.deadline <= datetime.now(UTC) + WINDOW
    row = await row_of(traces, reserved.document_id)
    assert (row["filename"], row["media_type"], row["file_bytes"]) == ("Cläim.pdf", PDF, len(DATA))
    assert (row["upload_deadline"], json.loads(row["metadata"])) == (reserved.deadline, {"a": 1})
    assert (row["job_id"], row["stage"], row["state"]) == (reserved.job_id, "queued", "queued")
    assert (row["priority"], row["correlation_id"]) == (3, "r-1")
    assert await traces.keys() == set()


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        ({"file_bytes": 0}, ErrorCode.EMPTY_FILE, "claim.pdf"),
        ({"file_bytes": -5}, ErrorCode.EMPTY_FILE, "claim.pdf"),
        ({"file_bytes": 200_001}, ErrorCode.FILE_TOO_LARGE, "200000"),
        ({"file_sha256": "abc"}, ErrorCode.INVALID_ARGUMENT, "sha256"),
        ({"file_sha256": "g" * 64}, ErrorCode.INVALID_ARGUMENT, "sha256"),
        ({"file_sha256": "a" * 64 + "\n"}, ErrorCode.INVALID_ARGUMENT, "sha256"),
        ({"metadata": {"a": None}}, ErrorCode.INVALID_METADATA, "a"),
        ({"correlation_id": "x" * 201}, ErrorCode.INVALID_ARGUMENT, "correlation_id"),
        ({"priority": 40_000}, ErrorCode.INVALID_ARGUMENT, "priority"),
        ({"media_type": "image/png"}, ErrorCode.TYPE_MISMATCH, "image/png"),
        ({"filename": "a.png", "media_type": "image/png"}, ErrorCode.UNSUPPORTED_TYPE, "PNG"),
        ({"filename": "a", "media_type": ""}, ErrorCode.UNSUPPORTED_TYPE, "PDF, DOCX"),
        ({"terms": Terms(1000, frozenset({MARKDOWN}))}, ErrorCode.UNSUPPORTED_TYPE, "Markdown"),
    ],
)
async def test_what_can_be_checked_at_once_is_refused_at_once_and_leaves_nothing(
    intake, user, traces, more, code, named
):
    data = b"x" * 1000
    with pytest.raises(PipelineError) as caught:
        await reserve(intake, user, data, **more)
    assert caught.value.code is code
    assert named in caught.value.message
    assert await traces.nothing()


async def test_a_file_of_exactly_the_limit_is_taken(intake, user):
    assert await reserve(intake, user, b"y" * intake.max_bytes)


async def test_the_same_bytes_while_they_are_awaited_are_the_same_document_under_the_newer_description(
    intake, user, traces
):
    first = await reserve(intake, user)
    again = await reserve(
        intake, user, filename="b.pdf", metadata={"b": 2}, window=2 * WINDOW, correlation_id="r-2", priority=5
    )
    assert (again.document_id, again.job_id, again.duplicate) == (first.document_id, first.job_id, False)
    assert again.deadline is not None
    assert first.deadline is not None
    assert again.deadline > first.deadline + WINDOW / 2
    row = await row_of(traces, first.document_id)
    assert (row["filename"], json.loads(row["metadata"])) == ("b.pdf", {"b": 2})
    assert (row["priority"], row["correlation_id"]) == (5, "r-2")
    assert await traces.jobs() == 1


async def test_bytes_that_are_known_are_given_back_and_nothing_is_awaited(intake, user, traces):
    async def whole():
        yield DATA

    accepted = await accept_file(
        intake, chunks=whole(), filename="a.pdf", user_id=user, metadata={}, correlation_id="one"
    )
    reserved = await reserve(intake, user)
    assert reserved.duplicate
    assert (reserved.document_id, reserved.job_id, reserved.deadline) == (accepted.document_id, accepted.job_id, None)
    row = await row_of(traces, accepted.document_id)
    assert (row["upload_deadline"], row["filename"], row["correlation_id"]) == (None, "a.pdf", "one")


async def test_announcements_at_once_make_one_document(intake, user, traces):
    reserved = await asyncio.gather(*(reserve(intake, user, filename=f"{n}.pdf") for n in range(6)))
    assert len({(one.document_id, one.job_id) for one in reserved}) == 1
    assert await traces.jobs() == 1


async def test_the_same_bytes_of_another_user_are_another_document(intake, user):
    mine, theirs = await reserve(intake, user), await reserve(intake, ids.LOCAL_USER_ID)
    assert mine.document_id != theirs.document_id


async def test_bytes_of_a_document_that_is_being_deleted_are_announced_once_it_is_gone(intake, user):
    first = await reserve(intake, user)
    await documents.begin_deletion(intake.db, first.document_id)
    with pytest.raises(PipelineError) as caught:
        await reserve(intake, user)
    assert caught.value.code is ErrorCode.INVALID_STATE
    assert "again" in caught.value.message
    await documents.finish_deletion(intake.db, first.document_id)
    again = await reserve(intake, user)
    assert again.document_id == first.document_id
    assert again.job_id != first.job_id


@pytest.mark.parametrize("ended", ["cancelled", "deadletter"])
async def test_a_job_that_ended_before_the_bytes_came_starts_again(intake, user, traces, ended):
    first = await reserve(intake, user)
    assert first.job_id is not None
    if ended == "cancelled":
        await queue.cancel_job(intake.db, first.job_id)
    else:
        (job,) = await queue.claim_jobs(
            intake.db, worker_id=user, pool="default", limit=1, after_user=None, ttl=timedelta(seconds=60)
        )
        await queue.fail_job(intake.db, job.lease, code="UPLOAD_EXPIRED", message="too late", retryable=False)
    assert (await row_of(traces, first.document_id))["state"] == ended
    again = await reserve(intake, user)
    assert (again.job_id, again.duplicate) == (first.job_id, False)
    row = await row_of(traces, first.document_id)
    assert (row["stage"], row["state"], row["error_code"]) == ("queued", "queued", None)


async def test_a_database_that_is_away_leaves_nothing_and_has_a_name(intake, user, traces):
    away = HookedDatabase(intake.db, before={("reserve_document", 1): raising(ConnectionRefusedError("no server"))})
    with pytest.raises(PipelineError) as caught:
        await reserve(replace(intake, db=away), user)
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert await traces.nothing()


async def test_an_answer_that_was_lost_is_asked_for_again(intake, user, traces):
    lost = HookedDatabase(intake.db, after={("reserve_document", 1): raising(asyncpg.InterfaceError("gone"))})
    with pytest.raises(PipelineError):
        await reserve(replace(intake, db=lost), user)
    assert await reserve(intake, user)
    assert await traces.jobs() == 1
