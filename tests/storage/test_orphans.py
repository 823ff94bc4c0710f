from __future__ import annotations

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4, uuid5

import pytest

from upload_pipeline.storage import keys, orphans
from upload_pipeline.storage.objects import ObjectInfo
from upload_pipeline.storage.orphans import LOOKUP_BATCH, survey, sweep
from upload_pipeline.storage.store import open_store

USER = uuid4()
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
GRACE = timedelta(hours=1)
OLD = NOW - GRACE - timedelta(seconds=1)

text_key = partial(keys.markdown_key, sha256="0" * 64)


async def nothing(ids: list[UUID]) -> set[UUID]:
    return set()


async def everything(ids: list[UUID]) -> set[UUID]:
    return set(ids)


async def listing(*infos: ObjectInfo) -> AsyncIterator[ObjectInfo]:
    for info in infos:
        yield info


async def found(*infos: ObjectInfo, known=nothing) -> list[str]:
    return [info.key for info in (await survey(listing(*infos), known, now=NOW, grace=GRACE)).orphans]


@pytest.mark.parametrize("make", [keys.raw_key, keys.parser_output_key, text_key])
async def test_an_old_object_is_an_orphan_only_without_its_document(make):
    document = uuid4()
    info = ObjectInfo(make(USER, document), 1, OLD)
    assert await found(info) == [info.key]

    async def this_one(ids: list[UUID]) -> set[UUID]:
        assert ids == [document]
        return {document}

    assert await found(info, known=this_one) == []


async def test_the_grace_time_protects_to_its_last_moment():
    key = keys.raw_key(USER, uuid4())
    incoming = keys.incoming_key(uuid4())
    assert await found(ObjectInfo(key, 1, NOW - GRACE), ObjectInfo(incoming, 1, NOW - GRACE)) == []
    assert await found(ObjectInfo(key, 1, OLD), ObjectInfo(incoming, 1, OLD)) == [incoming, key]


async def test_an_old_upload_is_an_orphan_whatever_the_documents_are():
    upload = keys.incoming_key(uuid4())
    assert await found(ObjectInfo(upload, 1, OLD), known=everything) == [upload]


@pytest.mark.parametrize("key", ["backup/x", "raw/x", "raw/a/b", "incoming/notes", "parsed/x/y.md", "incoming/a/b"])
async def test_what_we_did_not_name_is_never_an_orphan(key):
    assert await found(ObjectInfo(key, 1, OLD)) == []


async def test_lookups_are_bounded_and_the_listing_is_never_held_whole():
    read = 0
    asked: list[int] = []
    known_documents = {uuid5(USER, str(number)) for number in range(0, 2600, 2)}

    async def many() -> AsyncIterator[ObjectInfo]:
        nonlocal read
        for number in range(2600):
            read += 1
            yield ObjectInfo(keys.raw_key(USER, uuid5(USER, str(number))), 1, OLD)

    async def known(ids: list[UUID]) -> set[UUID]:
        asked.append(len(ids))
        assert read <= sum(asked)
        return known_documents & set(ids)

    seen = await survey(many(), known, now=NOW, grace=GRACE)
    assert {info.key for info in seen.orphans} == {
        keys.raw_key(USER, uuid5(USER, str(number))) for number in range(1, 2600, 2)
    }
    assert asked == [LOOKUP_BATCH] * 5 + [100]
    assert (seen.with_row, seen.without_row) == (1300, 1300)


async def test_a_round_holds_and_removes_no_more_than_it_may(store, monkeypatch):
    monkeypatch.setattr(orphans, "ROUND", 2)
    for _ in range(3):
        await store.put_bytes(keys.raw_key(USER, uuid4()), b"x")
    later = datetime.now(UTC) + 2 * GRACE
    assert [(await sweep(store, nothing, now=later, grace=GRACE)).objects for _ in range(3)] == [2, 1, 0]


async def test_nothing_is_touched_without_leave(store):
    lost, upload = keys.raw_key(USER, uuid4()), keys.incoming_key(uuid4())
    for key in (lost, upload):
        await store.put_bytes(key, b"x")
    shown = []

    async def refuse(found):
        shown.append((found.with_row, found.without_row, len(found.orphans)))
        return False

    later = datetime.now(UTC) + 2 * GRACE
    assert (await sweep(store, nothing, now=later, grace=GRACE, permit=refuse)).objects == 0
    young = await sweep(store, nothing, now=datetime.now(UTC), grace=GRACE, permit=refuse, young_too=True)
    assert young.objects == 0
    assert shown == [(0, 1, 2), (0, 1, 0)]
    assert {info.key async for info in store.list()} == {lost, upload}


async def test_a_document_with_three_objects_is_asked_for_once():
    document = uuid4()

    async def known(ids: list[UUID]) -> set[UUID]:
        assert ids == [document]
        return set()

    makers = (keys.raw_key, text_key, keys.parser_output_key)
    infos = [ObjectInfo(make(USER, document), 1, OLD) for make in makers]
    assert await found(*infos, known=known) == [info.key for info in infos]


async def test_a_sweep_removes_what_is_lost_and_nothing_else(store):
    kept, lost = uuid4(), uuid4()
    left = {keys.raw_key(USER, kept), text_key(USER, kept), "backup/x"}
    gone = {keys.raw_key(USER, lost), keys.parser_output_key(USER, lost), keys.incoming_key(uuid4())}
    for key in left | gone:
        await store.put_bytes(key, b"12345")

    async def known(ids: list[UUID]) -> set[UUID]:
        return {kept} & set(ids)

    now = datetime.now(UTC)
    early = await sweep(store, known, now=now, grace=timedelta(minutes=5))
    assert (early.objects, early.unfinished) == (0, 0)

    later = now + timedelta(minutes=10)
    first = await sweep(store, known, now=later, grace=timedelta(minutes=5))
    assert (first.objects, first.object_bytes, first.unfinished) == (3, 15, 0)
    assert {info.key async for info in store.list()} == left
    second = await sweep(store, known, now=later, grace=timedelta(minutes=5))
    assert (second.objects, second.object_bytes) == (0, 0)


async def test_a_sweep_removes_unfinished_writes(local, root):
    await local.put_bytes("raw/x", b"")
    (root / ".unfinished" / "0123").write_bytes(b"half")
    now = datetime.now(UTC)
    assert (await sweep(local, nothing, now=now, grace=GRACE)).unfinished == 0
    assert (await sweep(local, nothing, now=now + 2 * GRACE, grace=GRACE)).unfinished == 1


async def test_an_object_that_is_uploaded_anew_during_the_sweep_stays(local, root):
    key = keys.raw_key(USER, uuid4())
    await local.put_bytes(key, b"old")
    now = datetime.now(UTC)
    old = (now - 2 * GRACE).timestamp()
    os.utime(root / key, (old, old))

    async def meanwhile(ids: list[UUID]) -> set[UUID]:
        await local.put_bytes(key, b"new")
        return set()

    assert (await sweep(local, meanwhile, now=now, grace=GRACE)).objects == 0
    assert await local.get_bytes(key, 10) == b"new"


async def test_a_sweep_of_a_bucket_goes_through_every_page_of_its_listing(s3_server, s3_bucket):
    last = UUID("ffffffff-ffff-4fff-bfff-ffffffffffff")
    kept = [keys.raw_key(USER, uuid4()) for _ in range(2050)]
    # A listing is in the order of the keys and has 1,000 on a page: the orphans are all on the third.
    lost = [keys.raw_key(last, uuid4()) for _ in range(70)]
    s3_server.add_objects(s3_bucket, [f"some/{key}" for key in kept + lost])
    documents = {UUID(key.rpartition("/")[2]) for key in kept}
    store = open_store(f"s3://{s3_bucket}/some")

    async def known(ids: list[UUID]) -> set[UUID]:
        return documents & set(ids)

    now = datetime.now(UTC)
    assert (await sweep(store, known, now=now, grace=GRACE)).objects == 0
    assert (await sweep(store, known, now=now + 2 * GRACE, grace=GRACE)).objects == len(lost)
    assert {info.key async for info in store.list()} == set(kept)
