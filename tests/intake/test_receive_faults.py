"""Announced bytes are brought while store or database fail, or the sender is cancelled; and the sweep spares them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from announced import DATA, assert_arrived, row_of, send
from failing_parts import FailingBackend, HookedDatabase, raising

from upload_pipeline.database import documents
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.orphans import sweep
from upload_pipeline.storage.store import ObjectStore


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
