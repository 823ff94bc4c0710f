"""Bytes that were announced, brought to the document that awaits them, and what may happen meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from announced import DATA, arriving, claim, reserve, row_of, send
from failing_parts import FailingBackend, HookedDatabase, raising
from sample_documents import make_document

from upload_pipeline.database import documents, queue
from upload_pipeline.database.deletion import delete_document
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file
from upload_pipeline.intake.receive import announce_upload
from upload_pipeline.storage.document_objects import remove_document_objects
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.orphans import sweep
from upload_pipeline.storage.store import ObjectStore

OTHER = make_document("pdf", 2)


@pytest.fixture
async def reserved(intake, user):
    return await reserve(intake, user)


async def assert_arrived(traces, reserved, *, state="queued") -> None:
    """The bytes are where they belong and nowhere else, nothing is awaited, and the job has nothing to wait for."""
    assert await traces.keys() == {reserved.raw_key}
    assert await traces.store.get_bytes(reserved.raw_key, len(DATA)) == DATA
    row = await row_of(traces, reserved.document_id)
    assert (row["upload_deadline"], row["stage"], row["state"], row["error_code"]) == (None, "queued", state, None)
    assert await traces.jobs() == 1


async def assert_awaited(traces, reserved) -> None:
    """Nothing has been left of what was tried."""
    assert await traces.keys() == set()
    row = await row_of(traces, reserved.document_id)
    assert (row["upload_deadline"], row["state"]) == (reserved.deadline, "queued")


async def snoozed(intake) -> None:
    """The job has looked, has seen nothing, and sleeps."""
    job = await claim(intake)
    await queue.snooze_job(intake.db, job.lease, delay=timedelta(seconds=30))


async def expired(intake) -> None:
    job = await claim(intake)
    await queue.fail_job(intake.db, job.lease, code="UPLOAD_EXPIRED", message="too late", retryable=False)


async def accept_whole(intake, user):
    return await accept_file(
        intake, chunks=arriving(DATA), filename="whole.pdf", user_id=user, metadata={"whole": 1}, correlation_id="whole"
    )


async def delete(intake, document_id) -> None:
    async def remove(deleted) -> None:
        await remove_document_objects(intake.store, document_id=deleted.document_id, raw_key=deleted.raw_key)

    assert await delete_document(intake.db, document_id, remove)


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


# Several at once.


async def test_senders_of_the_same_bytes_at_once_all_succeed(intake, traces, reserved):
    await asyncio.gather(*(send(intake, reserved.document_id) for _ in range(5)))
    await assert_arrived(traces, reserved)


async def test_a_wrong_sender_does_not_disturb_a_right_one(intake, traces, reserved):
    async def wrong_in_the_middle():
        yield DATA[:1000]
        await asyncio.gather(send(intake, reserved.document_id, OTHER), return_exceptions=True)
        yield DATA[1000:]

    await send(intake, reserved.document_id, chunks=wrong_in_the_middle())
    await assert_arrived(traces, reserved)


@pytest.mark.parametrize("before", [snoozed, expired, None])
async def test_a_file_that_comes_whole_fulfils_what_awaits_its_bytes(intake, user, traces, reserved, before):
    if before is not None:
        await before(intake)
    accepted = await accept_whole(intake, user)
    assert (accepted.document_id, accepted.job_id, accepted.duplicate) == (
        reserved.document_id,
        reserved.job_id,
        False,
    )
    await assert_arrived(traces, reserved)
    row = await row_of(traces, reserved.document_id)
    assert (row["filename"], row["correlation_id"]) == ("whole.pdf", "whole")
    assert (await accept_whole(intake, user)).duplicate
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)


async def test_a_file_that_comes_whole_starts_a_cancelled_job_again(intake, user, traces, reserved):
    await queue.cancel_job(intake.db, reserved.job_id)
    assert not (await accept_whole(intake, user)).duplicate
    await assert_arrived(traces, reserved)


async def test_a_file_that_comes_whole_while_its_bytes_are_sent_is_one_document(intake, user, traces, reserved):
    async def whole_in_the_middle():
        yield DATA[:1000]
        assert not (await accept_whole(intake, user)).duplicate
        yield DATA[1000:]

    await send(intake, reserved.document_id, chunks=whole_in_the_middle())
    await assert_arrived(traces, reserved)


async def test_files_that_come_whole_at_once_fulfil_it_once(intake, user, traces, reserved):
    accepted = await asyncio.gather(
        *(accept_whole(intake, user) for _ in range(4)), *(send(intake, reserved.document_id) for _ in range(3))
    )
    assert sum(one is not None and not one.duplicate for one in accepted) <= 1
    await assert_arrived(traces, reserved)


async def test_a_failed_intake_leaves_the_bytes_that_another_way_has_brought(intake, user, traces, reserved):
    async def sent_and_fail() -> None:
        await traces.store.put_bytes(reserved.raw_key, DATA)
        raise asyncpg.DivisionByZeroError("1/0")

    failing = HookedDatabase(intake.db, before={("accept_document", 1): sent_and_fail})
    with pytest.raises(asyncpg.DivisionByZeroError):
        await accept_whole(replace(intake, db=failing), user)
    assert await traces.keys() == {reserved.raw_key}
    assert await traces.store.get_bytes(reserved.raw_key, len(DATA)) == DATA
    assert (await row_of(traces, reserved.document_id))["upload_deadline"] == reserved.deadline


async def test_an_intake_that_withdraws_puts_back_what_a_reservation_has_come_to_await_meanwhile(intake, user, traces):
    async def announced() -> None:
        await reserve(intake, user)

    hooked = HookedDatabase(
        intake.db,
        before={("accept_document", 1): raising(asyncpg.DivisionByZeroError("1/0"))},
        after={("documents", 2): announced},
    )
    with pytest.raises(asyncpg.DivisionByZeroError):
        await accept_whole(replace(intake, db=hooked), user)
    (document,) = await traces.documents()
    assert await traces.keys() == {raw_key(user, document)}


# Deletion.


@pytest.mark.parametrize("whole", [True, False], ids=["deleted", "half deleted"])
async def test_a_document_deleted_while_its_bytes_come_leaves_neither_row_nor_object(intake, traces, reserved, whole):
    async def deleted_in_the_middle():
        yield DATA[:1000]
        if whole:
            await delete(intake, reserved.document_id)
        else:
            await documents.begin_deletion(intake.db, reserved.document_id)
        yield DATA[1000:]

    with pytest.raises(PipelineError) as caught:
        await send(intake, reserved.document_id, chunks=deleted_in_the_middle())
    assert caught.value.code is ErrorCode.DOCUMENT_NOT_FOUND
    assert await traces.keys() == set()
    assert await documents.finish_deletion(intake.db, reserved.document_id) is not whole
    assert await traces.nothing()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_document_deleted_around_the_last_word_leaves_neither_row_nor_object(intake, traces, reserved, moment):
    async def deleted() -> None:
        await delete(intake, reserved.document_id)

    hooked = HookedDatabase(intake.db, **{moment: {("confirm_upload", 1): deleted}})
    if moment == "before":
        with pytest.raises(PipelineError) as caught:
            await send(replace(intake, db=hooked), reserved.document_id)
        assert caught.value.code is ErrorCode.DOCUMENT_NOT_FOUND
    else:
        await send(replace(intake, db=hooked), reserved.document_id)
    assert await traces.nothing()


async def test_bytes_for_a_document_made_anew_meanwhile_are_left_for_its_job_to_find(intake, user, traces, reserved):
    async def made_anew() -> None:
        await delete(intake, reserved.document_id)
        await reserve(intake, user)

    hooked = HookedDatabase(intake.db, before={("confirm_upload", 1): made_anew})
    with pytest.raises(PipelineError) as caught:
        await send(replace(intake, db=hooked), reserved.document_id)
    assert caught.value.code is ErrorCode.DOCUMENT_NOT_FOUND
    row = await row_of(traces, reserved.document_id)
    assert row["upload_deadline"] is not None
    await send(intake, reserved.document_id)
    assert await traces.keys() == {reserved.raw_key}


# Failing parts.


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["write", "move"])
async def test_a_store_that_fails_is_tried_again(intake, traces, reserved, method, after):
    broken = replace(intake, store=ObjectStore(FailingBackend(intake.store.backend, method, after)))
    with pytest.raises(PipelineError) as caught:
        await send(broken, reserved.document_id)
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    # what the move had done is the document's: its job would find it
    assert await traces.keys() == ({reserved.raw_key} if (method, after) == ("move", True) else set())
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)


async def test_a_database_that_is_gone_after_the_move_leaves_the_bytes_to_the_job(intake, traces, reserved):
    gone = HookedDatabase(intake.db, before={("confirm_upload", 1): raising(ConnectionResetError("gone"))})
    with pytest.raises(PipelineError) as caught:
        await send(replace(intake, db=gone), reserved.document_id)
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert await traces.keys() == {reserved.raw_key}
    assert (await row_of(traces, reserved.document_id))["upload_deadline"] == reserved.deadline
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)


async def test_a_database_that_comes_back_is_waited_for(intake, traces, reserved):
    away = HookedDatabase(intake.db, before={("confirm_upload", 1): raising(ConnectionResetError("gone"))})
    await send(replace(intake, db=away, retry_seconds=30.0), reserved.document_id)
    assert away.calls["confirm_upload"] == 2
    await assert_arrived(traces, reserved)


async def test_a_cancelled_sender_leaves_all_or_nothing(intake, traces, reserved):
    reached = asyncio.Event()

    async def wait_for_ever() -> None:
        reached.set()
        await asyncio.sleep(3600)

    hooked = HookedDatabase(intake.db, before={("confirm_upload", 1): wait_for_ever})
    task = asyncio.create_task(send(replace(intake, db=hooked), reserved.document_id))
    await asyncio.wait_for(reached.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await traces.keys() == {reserved.raw_key}
    await send(intake, reserved.document_id)
    await assert_arrived(traces, reserved)


async def test_the_sweep_leaves_what_an_awaited_document_has(intake, traces, reserved):
    await traces.store.put_bytes(reserved.raw_key, DATA)

    async def known(document_ids):
        return await documents.existing_documents(traces.db, document_ids)

    swept = await sweep(traces.store, known, now=datetime.now(UTC) + timedelta(hours=2), grace=timedelta(hours=1))
    assert swept.objects == 0
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


# A document that has changed hands: its id and its key are still those of its first owner.


@pytest.fixture
async def claimed(reserved, admin):
    """Whose the reserved document is now."""
    owner = uuid4()
    await admin.execute(
        "update upload_pipeline.documents set user_id = $1 where document_id = $2", owner, reserved.document_id
    )
    return owner


async def test_announced_again_by_its_new_owner_it_is_the_same_one(intake, traces, reserved, claimed):
    again = await reserve(intake, claimed)
    assert (again.document_id, again.job_id, again.raw_key) == (
        reserved.document_id,
        reserved.job_id,
        reserved.raw_key,
    )
    await send(intake, again.document_id)
    assert await traces.keys() == {reserved.raw_key}


async def test_whole_bytes_of_its_new_owner_are_put_where_it_awaits_them(intake, traces, reserved, claimed):
    accepted = await accept_whole(intake, claimed)
    assert (accepted.document_id, accepted.job_id, accepted.duplicate) == (
        reserved.document_id,
        reserved.job_id,
        False,
    )
    assert await traces.keys() == {reserved.raw_key}
    assert (await accept_whole(intake, claimed)).duplicate
    assert await traces.keys() == {reserved.raw_key}


async def test_whole_bytes_of_its_new_owner_bring_back_an_object_that_is_gone(intake, traces, reserved, claimed):
    await send(intake, reserved.document_id)
    await traces.store.delete([reserved.raw_key])
    assert (await accept_whole(intake, claimed)).duplicate
    assert await traces.keys() == {reserved.raw_key}


async def test_it_changes_hands_between_look_and_row_and_the_sender_is_asked_to_try_again(
    intake, user, traces, reserved, admin
):
    owner = uuid4()

    async def changes_hands() -> None:
        await admin.execute("update upload_pipeline.documents set user_id = $1", owner)

    hooked = HookedDatabase(intake.db, after={("documents", 1): changes_hands})
    with pytest.raises(PipelineError) as caught:
        await accept_whole(replace(intake, db=hooked), owner)
    assert caught.value.code is ErrorCode.INVALID_STATE
    assert "again" in caught.value.message
    assert await traces.keys() == set()
    assert not (await accept_whole(intake, owner)).duplicate
    assert await traces.keys() == {reserved.raw_key}
