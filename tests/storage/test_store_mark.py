"""The mark that says whose store it is, and how much may be missing in a database before nothing is removed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from upload_pipeline.storage.keys import is_incoming_key, parse_key
from upload_pipeline.storage.orphans import Survey, sweep
from upload_pipeline.storage.store_mark import FEW, MARK_KEY, Mark, read_mark, too_many, write_mark


async def test_a_mark_takes_the_place_of_the_one_before(store):
    assert await read_mark(store) is None
    for mark in (uuid4(), uuid4()):
        await write_mark(store, mark)
        assert await read_mark(store) == Mark(mark)
    assert [info.key async for info in store.list()] == [MARK_KEY]


@pytest.mark.parametrize("content", [b"", b"mine", bytes([255]), b"x" * 5000])
async def test_what_is_no_mark_is_nobodys(local, content):
    await local.put_bytes(MARK_KEY, content)
    assert await read_mark(local) == Mark(None)


async def test_the_mark_itself_is_no_orphan(local):
    assert parse_key(MARK_KEY) is None
    assert not is_incoming_key(MARK_KEY)
    await write_mark(local, uuid4())

    async def nothing(ids):
        return set()

    assert (await sweep(local, nothing, now=datetime.now(UTC) + timedelta(days=9), grace=timedelta(0))).objects == 0


@pytest.mark.parametrize(
    ("without_row", "with_row", "marked", "refused"),
    [
        (0, 0, False, False),
        (1, 0, False, True),
        (1, 9, False, False),
        (2, 9, False, True),
        (FEW, 0, True, False),
        (FEW + 1, 0, True, True),
        (FEW + 1, 9 * FEW + 8, True, True),
        (FEW + 1, 9 * FEW + 9, True, False),
    ],
)
def test_few_of_all_may_go_and_few_at_all_where_the_store_is_known(without_row, with_row, marked, refused):
    told = too_many(Survey(with_row=with_row, without_row=without_row), marked=marked)
    assert (told is not None) is refused
    if told:
        assert f"{without_row} of the {without_row + with_row} objects" in told
        assert ("bears no database's mark" in told) is not marked


async def test_the_stores_own_clock_is_asked_and_nothing_left_of_the_question(store):
    began = datetime.now(UTC) - timedelta(seconds=2)
    assert began < await store.time() < datetime.now(UTC) + timedelta(seconds=2)
    assert [info.key async for info in store.list()] == []
