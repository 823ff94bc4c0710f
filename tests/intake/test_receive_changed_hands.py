"""A document that has changed hands: its id and its key are still those of its first owner."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest
from announced import accept_whole, reserve, send
from failing_parts import HookedDatabase

from upload_pipeline.errors import ErrorCode, PipelineError


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
