"""Bytes that were announced, brought to the document that awaits them, and what its job does meanwhile."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest
from announced import (
    DATA,
    arriving,
    assert_arrived,
    assert_awaited,
    claim,
    delete,
    expired,
    reserve,
    row_of,
    send,
    snoozed,
)
from sample_documents import make_document

from upload_pipeline.database import queue
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.receive import announce_upload


async def test_bytes_that_come_are_put_in_place_and_are_no_longer_awaited(intake, traces, reserved):
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)
    assert not intake.scratch.exists()


async def test_what_a_file_is_is_told_by_its_bytes(intake, user, traces):
    data = make_document("html", 3)
    reserved = await reserve(intake, user, data, filename="page", media_type="text/plain")
    assert reserved.media_type == "text/plain"
    await send(intake, reserved.document_id, data, announced=data)
    assert (await row_of(traces, reserved.document_id))["media_type"] == "text/html"


@pytest.mark.parametrize(
    ("data", "word"),
    [(b"", "0 bytes"), (DATA[:-1], f"{len(DATA) - 1} bytes"), (DATA + b"x", "more"), (b"x" * len(DATA), "sha256")],
)
async def test_other_bytes_than_the_announced_ones_leave_nothing(intake, traces, reserved, data, word):
    with pytest.raises(PipelineError) as caught:
        await send(intake, reserved.document_id, data)
    assert caught.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert word in caught.value.message
    await assert_awaited(traces, reserved)
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)


async def test_a_sender_that_never_stops_is_cut_off_at_what_was_announced(intake, traces, reserved):
    taken = 0

    async def for_ever():
        nonlocal taken
        while True:
            taken += 1000
            yield b"x" * 1000

    with pytest.raises(PipelineError, match="more than"):
        await send(intake, reserved.document_id, chunks=for_ever())
    assert taken <= len(DATA) + 1000
    await assert_awaited(traces, reserved)


async def test_content_that_contradicts_the_name_leaves_nothing(intake, user, traces):
    data = b"only words"
    reserved = await reserve(intake, user, data)
    with pytest.raises(PipelineError) as caught:
        await send(intake, reserved.document_id, data, announced=data)
    assert caught.value.code is ErrorCode.TYPE_MISMATCH
    await assert_awaited(traces, reserved)


async def test_a_sender_that_breaks_off_leaves_nothing_and_its_error_comes_out(intake, traces, reserved):
    async def breaking_off():
        yield DATA[:100]
        raise ConnectionResetError("the browser went away")

    with pytest.raises(ConnectionResetError, match="went away"):
        await send(intake, reserved.document_id, chunks=breaking_off())
    await assert_awaited(traces, reserved)


async def test_a_document_that_is_not_there_takes_no_byte(intake, traces):
    source = arriving(DATA)
    with pytest.raises(PipelineError) as caught:
        await send(intake, uuid4(), chunks=source)
    assert caught.value.code is ErrorCode.DOCUMENT_NOT_FOUND
    assert await anext(source) == DATA[:1000]
    assert await traces.nothing()


async def test_a_sender_that_heard_no_answer_sends_again_and_nothing_changes(intake, traces, reserved):
    await send(intake, reserved.document_id)
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)
    with pytest.raises(PipelineError, match="sha256"):
        await send(intake, reserved.document_id, b"x" * len(DATA))
    await assert_arrived(traces, reserved)
    assert await traces.db.fetchval("select count(*) from upload_pipeline.events where code = 'document_accepted'") == 1


async def test_bytes_sent_again_bring_back_an_object_that_is_gone(intake, traces, reserved):
    await send(intake, reserved.document_id)
    await traces.store.delete([reserved.raw_key])
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)


# What the job does meanwhile.


async def test_a_job_that_sleeps_is_ready_at_once(intake, traces, reserved):
    await snoozed(intake)
    assert (await row_of(traces, reserved.document_id))["state"] == "retryable"
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)
    assert (await claim(intake)).job_id == reserved.job_id


async def test_a_job_that_is_at_work_and_saw_nothing_does_not_sleep_on_it(intake, traces, reserved):
    job = await claim(intake)
    await send(intake, reserved.document_id)
    await queue.snooze_job(intake.db, job.lease, delay=timedelta(seconds=30))
    assert await queue.promote_due(intake.db) == 1
    await assert_arrived(traces, reserved)


@pytest.mark.parametrize("code", [ErrorCode.UPLOAD_EXPIRED, ErrorCode.CHECKSUM_MISMATCH])
async def test_a_job_that_is_at_work_and_saw_what_is_outdated_does_not_fail_of_it(intake, traces, reserved, code):
    job = await claim(intake)
    await send(intake, reserved.document_id)
    failure = await queue.fail_job(intake.db, job.lease, code=code, message="too late", retryable=False)
    assert (failure.state, failure.retry_count) == ("retryable", 0)
    assert await queue.promote_due(intake.db) == 1
    await assert_arrived(traces, reserved)
    # once: the next failure is one
    job = await claim(intake)
    assert (await queue.fail_job(intake.db, job.lease, code=code, message="bad", retryable=False)).state == "deadletter"


async def test_late_bytes_start_a_job_again_that_had_given_them_up(intake, traces, reserved):
    await expired(intake)
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)


async def test_a_job_that_was_cancelled_stays_so_and_has_its_bytes_should_it_be_retried(intake, traces, reserved):
    await queue.cancel_job(intake.db, reserved.job_id)
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved, state="cancelled")
    await queue.retry_job(intake.db, reserved.job_id, from_stage=None)
    await assert_arrived(traces, reserved)


async def test_the_end_of_the_wait_told_by_the_job_and_by_the_sender_is_one(intake, traces, reserved):
    from upload_pipeline.database.uploads import commit_validation

    job = await claim(intake)
    await commit_validation(intake.db, job.lease, media_type="application/pdf", keep=True, ttl=timedelta(seconds=60))
    await send(intake, reserved.document_id)
    row = await row_of(traces, reserved.document_id)
    assert (row["stage"], row["state"], row["upload_deadline"]) == ("job_validated", "working", None)
    assert await traces.keys() == {reserved.raw_key}


# "The bytes are there."


async def test_an_announcement_makes_a_sleeping_job_look_and_checks_nothing_itself(intake, traces, reserved):
    await snoozed(intake)
    await announce_upload(intake, document_id=reserved.document_id)
    await announce_upload(intake, document_id=reserved.document_id)
    await assert_awaited(traces, reserved)


async def test_an_announcement_starts_a_job_again_that_had_given_up(intake, traces, reserved):
    await expired(intake)
    await announce_upload(intake, document_id=reserved.document_id)
    await assert_awaited(traces, reserved)


async def test_an_announcement_is_not_lost_on_a_job_at_work(intake, reserved):
    job = await claim(intake)
    await announce_upload(intake, document_id=reserved.document_id)
    await queue.snooze_job(intake.db, job.lease, delay=timedelta(seconds=30))
    assert await queue.promote_due(intake.db) == 1


async def test_an_announcement_of_what_is_known_cancelled_or_gone_starts_nothing(intake, traces, reserved):
    await queue.cancel_job(intake.db, reserved.job_id)
    await announce_upload(intake, document_id=reserved.document_id)
    assert (await row_of(traces, reserved.document_id))["state"] == "cancelled"
    await send(intake, reserved.document_id)
    await announce_upload(intake, document_id=reserved.document_id)
    assert (await row_of(traces, reserved.document_id))["state"] == "cancelled"
    await delete(intake, reserved.document_id)
    with pytest.raises(PipelineError) as caught:
        await announce_upload(intake, document_id=reserved.document_id)
    assert caught.value.code is ErrorCode.DOCUMENT_NOT_FOUND
