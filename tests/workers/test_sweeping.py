"""Whose store it is: databases that may sweep it, and those that are refused, on real databases and a real store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from probe_world import ProbeWorld

from upload_pipeline.database.upkeep_rounds import is_store_mark
from upload_pipeline.database.uploads import reserve_document
from upload_pipeline.storage.keys import incoming_key, raw_key
from upload_pipeline.storage.objects import ObjectInfo
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_pipeline.storage.store_mark import FEW, MARK_KEY, read_mark, write_mark
from upload_workers.sweeping import adopt_store, sweep_store, sweep_when_due

AT_ONCE = timedelta(seconds=-1)
"""A grace that nothing is too young for: a disk's times are as coarse as the kernel's clock."""


@pytest.fixture
async def pool(world: ProbeWorld) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(world.worker_url, min_size=1, max_size=8) as pool:
        yield pool


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(f"file://{tmp_path / 'objects'}")


async def add_object(store: ObjectStore, world: ProbeWorld | None = None) -> str:
    """An object, with a row where a database is named."""
    user, document = uuid4(), uuid4()
    key = raw_key(user, document)
    await store.put_bytes(key, b"bytes")
    if world is not None:
        await world.admin.execute(
            """
            insert into upload_pipeline.documents
              (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
            values ($1, $2, 'a.txt', 'text/plain', 5, $4, $3)
            """,
            document,
            user,
            key,
            os.urandom(32).hex(),
        )
    return key


async def keys_of(store: ObjectStore) -> set[str]:
    return {info.key async for info in store.list()} - {MARK_KEY}


async def refusals(world: ProbeWorld) -> int:
    """Alarms so far."""
    count: int = await world.admin.fetchval(
        "select count(*) from upload_pipeline.events where code = 'upkeep_refused' and severity = 'error'"
    )
    return count


async def marked(pool: asyncpg.Pool, store: ObjectStore) -> UUID:
    """The store, as a first round marks it while it is empty."""
    assert (await sweep_store(pool, store, grace=AT_ONCE)).refusal is None
    found = await read_mark(store)
    assert found is not None
    assert found.value is not None
    return found.value


@dataclass
class OtherClock:
    """A place whose clock is behind that of this machine."""

    inner: Any
    behind: timedelta

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def head(self, key: str) -> ObjectInfo | None:
        found = await self.inner.head(key)
        return found and replace(found, modified_at=found.modified_at - self.behind)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        async for found in self.inner.list(prefix):
            yield replace(found, modified_at=found.modified_at - self.behind)


async def test_objects_are_as_old_as_the_stores_own_clock_says(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    await marked(pool, store)
    young = await add_object(store)
    behind = replace(store, backend=OtherClock(store.backend, timedelta(hours=3)))
    assert (await sweep_store(pool, behind, grace=timedelta(hours=1))).swept.objects == 0
    assert await keys_of(store) == {young}


async def test_each_round_leaves_a_new_mark_that_the_database_knows(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    first, second = await marked(pool, store), await marked(pool, store)
    assert first != second
    assert await is_store_mark(pool, second)
    orphan = await add_object(store)
    swept = await sweep_store(pool, store, grace=AT_ONCE)
    assert (swept.swept.objects, swept.refusal) == (1, None)
    assert orphan not in await keys_of(store)
    # A round that died after it had written its mark, or before: both are known.
    await write_mark(store, first)
    assert (await sweep_store(pool, store, grace=AT_ONCE)).refusal is None
    assert await refusals(world) == 0


async def test_a_store_of_another_database_is_left_alone_and_told_until_it_is_adopted(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    await write_mark(store, uuid4())
    files = {await add_object(store), incoming_key(uuid4())}
    for key in files:
        await store.put_bytes(key, b"bytes")
    for alarms in (1, 2):
        refused = await sweep_store(pool, store, grace=AT_ONCE)
        assert refused.swept.objects == 0
        assert refused.refusal is not None
        assert "mark of another database" in refused.refusal
        assert "--adopt-store" in refused.refusal
        assert await refusals(world) == alarms
    assert await keys_of(store) == files
    told = "select refusal from upload_pipeline.upkeep_rounds where name = 'sweep'"
    assert await world.admin.fetchval(told) == refused.refusal
    adopted = await adopt_store(pool, store, grace=AT_ONCE)
    assert (adopted.swept.objects, adopted.swept.object_bytes) == (2, 10)
    assert await world.admin.fetchval(told) is None
    assert (await sweep_store(pool, store, grace=AT_ONCE)).refusal is None


async def test_a_database_restored_from_a_backup_removes_nothing_that_came_after_it(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    await marked(pool, store)
    backup = await world.admin.fetch("select mark, made_at from upload_pipeline.store_marks")
    later = await add_object(store, world)
    await marked(pool, store)
    await world.admin.execute("delete from upload_pipeline.store_marks")
    await world.admin.executemany(
        "insert into upload_pipeline.store_marks (mark, made_at) values ($1, $2)", [tuple(row) for row in backup]
    )
    await world.admin.execute("delete from upload_pipeline.documents")
    assert (await sweep_store(pool, store, grace=AT_ONCE)).refusal is not None
    assert await keys_of(store) == {later}


async def test_an_empty_database_does_not_take_an_unmarked_store_with_files_for_its_own(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    young = await add_object(store)
    for grace in (AT_ONCE, timedelta(days=1)):
        refused = await sweep_store(pool, store, grace=grace)
        assert refused.refusal is not None
        assert "1 of the 1 objects" in refused.refusal
    assert await keys_of(store) == {young}
    assert await read_mark(store) is None


async def test_an_unmarked_store_whose_files_are_nearly_all_known_is_the_databases(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    kept = {await add_object(store, world) for _ in range(9)}
    await add_object(store)
    swept = await sweep_store(pool, store, grace=AT_ONCE)
    assert (swept.swept.objects, swept.refusal) == (1, None)
    assert await keys_of(store) == kept
    assert await read_mark(store) is not None


async def test_a_round_that_would_remove_very_much_removes_nothing(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    await marked(pool, store)
    for _ in range(FEW + 1):
        await add_object(store)
    refused = await sweep_store(pool, store, grace=AT_ONCE)
    assert refused.swept.objects == 0
    assert f"{FEW + 1} of the {FEW + 1} objects" in (refused.refusal or "")
    assert len(await keys_of(store)) == FEW + 1
    assert (await adopt_store(pool, store, grace=AT_ONCE)).swept.objects == FEW + 1


async def test_one_worker_of_all_looks_through_the_store_in_an_interval(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    await marked(pool, store)
    await add_object(store)

    async def at_once(workers: int) -> list[int]:
        rounds = [sweep_when_due(pool, store, grace=AT_ONCE, interval=timedelta(hours=1)) for _ in range(workers)]
        return sorted(each.swept.objects for each in await asyncio.gather(*rounds))

    # note_upkeep of the round above has made the row
    await world.admin.execute("update upload_pipeline.upkeep_rounds set begun_at = begun_at - interval '61 minutes'")
    assert await at_once(8) == [0] * 7 + [1]
    await add_object(store)
    assert await at_once(8) == [0] * 8
    # The one that had claimed it has died: it is the next interval's.
    await world.admin.execute("update upload_pipeline.upkeep_rounds set begun_at = begun_at - interval '59 minutes'")
    assert await at_once(2) == [0, 0]
    await world.admin.execute("update upload_pipeline.upkeep_rounds set begun_at = begun_at - interval '2 minutes'")
    assert await at_once(2) == [0, 1]


async def test_a_clock_that_was_set_back_does_not_stop_the_rounds(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    await marked(pool, store)
    await world.admin.execute("update upload_pipeline.upkeep_rounds set begun_at = begun_at + interval '2 days'")
    await add_object(store)
    swept = await sweep_when_due(pool, store, grace=AT_ONCE, interval=timedelta(hours=1))
    assert swept.swept.objects == 1


@dataclass
class Announcing:
    """A place in which a file is announced again in the instant before its orphaned bytes are moved or deleted."""

    inner: Any
    key: str
    announce: Callable[[], Awaitable[object]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def move(self, source: str, target: str) -> None:
        if source == self.key:
            await self.announce()
        await self.inner.move(source, target)

    async def delete(self, keys: list[str]) -> None:
        if self.key in keys:
            await self.announce()
        await self.inner.delete(keys)


async def test_bytes_of_a_file_that_is_announced_again_while_they_are_removed_stay(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore
) -> None:
    await marked(pool, store)
    user, document = uuid4(), uuid4()
    key = raw_key(user, document)
    await store.put_bytes(key, b"bytes")

    async def announce() -> None:
        await reserve_document(
            pool,
            document_id=document,
            user_id=user,
            filename="a.txt",
            media_type="text/plain",
            file_bytes=5,
            file_sha256=os.urandom(32).hex(),
            raw_key=key,
            window=timedelta(minutes=20),
            metadata={},
        )

    place = replace(store, backend=Announcing(store.backend, key, announce))
    assert (await sweep_store(pool, place, grace=AT_ONCE)).swept.objects == 0
    assert await keys_of(store) == {key}
    assert await store.get_bytes(key, 5) == b"bytes"
    assert await world.admin.fetchval("select count(*) from upload_pipeline.documents") == 1
