"""Announced bytes that come more than once at the same moment, whole or by themselves, or while their document goes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import asyncpg
import pytest
from announced import DATA, accept_whole, assert_arrived, delete, expired, reserve, row_of, send, snoozed
from failing_parts import HookedDatabase, raising
from sample_documents import make_document

from upload_pipeline.database import documents, queue
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.keys import raw_key

OTHER = make_document("pdf", 2)


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
