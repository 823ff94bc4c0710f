"""Orphans that come into use while they are removed, and sweeps that die in the midst of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from upload_pipeline.storage import keys
from upload_pipeline.storage.aside import HELD, aside_key, key_of_aside, settle, withdraw
from upload_pipeline.storage.orphans import sweep
from upload_pipeline.storage.photo_keys import photo_key
from upload_pipeline.storage.store import ObjectStore

GRACE = timedelta(hours=1)
LATER = datetime.now(UTC) + 2 * GRACE
DOCUMENT = uuid4()
KEY = keys.raw_key(uuid4(), DOCUMENT)


class Killed(BaseException):
    """What a process that is killed does from then on: nothing."""


@dataclass
class Watched:
    """A place where something happens before an object is moved or deleted, or which dies at the nth such call."""

    inner: Any
    before: Any = None
    dies_before: int = 0
    calls: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _changes(self) -> None:
        self.calls += 1
        if self.before is not None:
            self.before()
        if self.dies_before and self.calls >= self.dies_before:
            raise Killed

    async def move(self, source: str, target: str) -> None:
        self._changes()
        await self.inner.move(source, target)

    async def delete(self, keys: list[str]) -> None:
        if keys:
            self._changes()
        await self.inner.delete(keys)


@dataclass
class Rows:
    """The documents that have a row."""

    ids: set[UUID] = field(default_factory=set)
    asked: int = 0
    comes_after: int = 0

    async def known(self, ids: list[UUID]) -> set[UUID]:
        answer = self.ids & set(ids)
        self.asked += 1
        if self.asked == self.comes_after:
            self.ids.add(DOCUMENT)
        return answer


def watched(store: ObjectStore, **how: Any) -> ObjectStore:
    return replace(store, backend=Watched(store.backend, **how))


async def keys_of(store: ObjectStore) -> set[str]:
    return {info.key async for info in store.list()}


@pytest.mark.parametrize("comes_after", [1, 2, 3])
async def test_an_orphan_whose_row_comes_after_a_lookup_stays_unless_it_was_gone_before(store, comes_after):
    await store.put_bytes(KEY, b"bytes")
    rows = Rows(comes_after=comes_after)
    swept = await sweep(store, rows.known, now=LATER, grace=GRACE)
    if comes_after < 3:
        assert (swept.objects, await store.get_bytes(KEY, 5)) == (0, b"bytes")
        assert await keys_of(store) == {KEY}
    else:  # the row is younger than the last look: its job waits for bytes
        assert (swept.objects, await keys_of(store)) == (1, set())


async def test_an_orphan_whose_row_comes_in_the_instant_of_its_removal_stays(store):
    await store.put_bytes(KEY, b"bytes")
    rows = Rows()
    place = watched(store, before=lambda: rows.ids.add(DOCUMENT))
    assert (await sweep(place, rows.known, now=LATER, grace=GRACE)).objects == 0
    assert await keys_of(store) == {KEY}
    assert await store.get_bytes(KEY, 5) == b"bytes"
    assert (await sweep(store, rows.known, now=LATER, grace=GRACE)).objects == 0
    assert await keys_of(store) == {KEY}


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("dies_before", [1, 2])
async def test_what_a_killed_sweep_had_moved_aside_is_ended_by_the_next(local, wanted, dies_before):
    await local.put_bytes(KEY, b"bytes")
    rows = Rows()
    with pytest.raises(Killed):
        await sweep(watched(local, dies_before=dies_before), rows.known, now=LATER, grace=GRACE)
    (left,) = await keys_of(local)
    assert (left if dies_before == 1 else key_of_aside(left)) == KEY
    if wanted:
        rows.ids.add(DOCUMENT)
    swept = await sweep(local, rows.known, now=LATER, grace=GRACE)
    assert (swept.objects, swept.object_bytes) == ((0, 0) if wanted else (1, 5))
    assert await keys_of(local) == ({KEY} if wanted else set())
    assert (await sweep(local, rows.known, now=LATER, grace=GRACE)).objects == 0


async def test_what_is_aside_belongs_to_whoever_moved_it_there_until_that_one_must_be_dead(store):
    aside = aside_key(KEY, uuid4())
    await store.put_bytes(KEY, b"bytes")
    await store.move(KEY, aside)
    moved_at = (await store.head(aside)).modified_at
    rows = Rows()
    early = await sweep(store, rows.known, now=moved_at + HELD / 2, grace=GRACE)
    assert (early.objects, await keys_of(store)) == (0, {aside})
    late = await sweep(store, rows.known, now=moved_at + HELD + timedelta(seconds=2), grace=GRACE)
    assert (late.objects, await keys_of(store)) == (1, set())


async def test_an_object_that_was_moved_is_as_young_as_the_move(root, local):
    await local.put_bytes(KEY, b"bytes")
    os.utime(root / KEY, (1, 1))
    await local.move(KEY, "raw/other")
    assert (await local.head("raw/other")).modified_at > datetime.now(UTC) - timedelta(minutes=1)


async def test_bytes_that_come_back_replace_none_that_came_meanwhile(local):
    aside = aside_key(KEY, uuid4())
    await local.put_bytes(aside, b"older")
    await local.put_bytes(KEY, b"newer")

    async def wanted(asked):
        return set(asked)

    assert await settle(local, [aside, "incoming/anything"], wanted) == set()
    assert await keys_of(local) == {KEY}
    assert await local.get_bytes(KEY, 5) == b"newer"


async def test_where_the_rows_cannot_be_asked_for_the_bytes_are_back(store):
    await store.put_bytes(KEY, b"bytes")
    asked = 0

    async def wanted(keys):
        nonlocal asked
        asked += 1
        if asked == 2:
            raise ConnectionResetError
        return set()

    with pytest.raises(ConnectionResetError):
        await withdraw(store, [KEY, keys.raw_key(uuid4(), uuid4())], wanted)
    assert await keys_of(store) == {KEY}
    assert await withdraw(store, [KEY], wanted) == {KEY}
    assert await withdraw(store, [KEY], wanted) == set()
    assert await keys_of(store) == set()


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        keys.parser_output_key(uuid4(), uuid4()),
        keys.markdown_key(uuid4(), uuid4(), "0" * 64),
        keys.hosted_output_key(uuid4(), uuid4(), "parse"),
        photo_key(uuid4(), date(2026, 3, 1), uuid4(), "image/png"),
    ],
    ids=["raw", "parser output", "markdown", "hosted output", "photo"],
)
def test_the_key_of_what_is_aside_names_the_one_that_it_had(key):
    aside = aside_key(key, uuid4())
    assert keys.validate_key(aside) == aside
    assert key_of_aside(aside) == key
    assert not keys.is_incoming_key(aside)
    for other in (key, keys.incoming_key(uuid4()), f"{aside}x", aside.upper(), f"raw/{aside}"):
        assert key_of_aside(other) is None
