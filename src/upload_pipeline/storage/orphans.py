"""What a crash leaves in the store: objects without a document or a photo, uploads that never ended, writes cut short.

An object is written before its row, so a process that dies in between leaves an object that nothing names. It
is left alone for a grace time, in which its row may still come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from upload_pipeline.storage.keys import is_incoming_key, parse_key
from upload_pipeline.storage.objects import ObjectInfo
from upload_pipeline.storage.photo_keys import parse_photo_key
from upload_pipeline.storage.store import ObjectStore

LOOKUP_BATCH = 500
"""Ids that one lookup asks for, and the most objects held in memory."""

REMOVED_AT_ONCE = 32
"""Orphans that are looked at once more at the same time and then go in one request: few, so that no upload comes in
between the two."""

KnownSubjects = Callable[[list[UUID]], Awaitable[set[UUID]]]
"""Which of these ids of documents and photos (distinct, at most `LOOKUP_BATCH`) have a row."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed.

    Attributes:
        objects: objects without a document or a photo and uploads that never ended.
        object_bytes: their size in all.
        unfinished: files of writes that were cut short.
    """

    objects: int
    object_bytes: int
    unfinished: int


async def find_orphans(
    listing: AsyncIterator[ObjectInfo], known: KnownSubjects, *, now: datetime, grace: timedelta
) -> AsyncIterator[ObjectInfo]:
    """The objects of a listing that nothing will ever name.

    That is: written more than `grace` ago and either an upload under `incoming/` or of a document or a photo that
    has no row. Keys of any other form are somebody else's and never in it.

    Args:
        listing: objects in any order; read a batch at a time, never whole.
        known: tells which documents and photos have a row.
        now: the time, with time zone.
        grace: how old an orphan must be.
    """
    batch: list[tuple[ObjectInfo, UUID]] = []
    async for info in listing:
        if info.modified_at >= now - grace:
            continue
        if is_incoming_key(info.key):
            yield info
        elif (subject := _subject_of(info.key)) is not None:
            batch.append((info, subject))
            if len(batch) == LOOKUP_BATCH:
                for orphan in await _without_row(batch, known):
                    yield orphan
                batch.clear()
    for orphan in await _without_row(batch, known):
        yield orphan


async def sweep(store: ObjectStore, known: KnownSubjects, *, now: datetime, grace: timedelta) -> Swept:
    """Removes the orphans of a store and the files of writes that were cut short.

    Safe to repeat and to run twice at once.
    Each object is looked at again just before it goes: where the same file was uploaded anew meanwhile, its
    time is new and it stays.

    Args:
        store: the store.
        known: tells which documents and photos have a row.
        now: the time, with time zone, by the clock that the store stamps objects with.
        grace: how old an orphan must be; far longer than an intake takes from its first byte to its commit.

    Raises:
        PipelineError: as the store's methods do; what was removed until then stays removed.
    """
    removed: list[int] = []
    batch: list[ObjectInfo] = []
    async for orphan in find_orphans(store.list(), known, now=now, grace=grace):
        batch.append(orphan)
        if len(batch) == REMOVED_AT_ONCE:
            removed += await _remove(store, batch, before=now - grace)
            batch.clear()
    removed += await _remove(store, batch, before=now - grace)
    return Swept(len(removed), sum(removed), await store.remove_unfinished(now - grace))


async def _remove(store: ObjectStore, orphans: list[ObjectInfo], *, before: datetime) -> list[int]:
    """Removes those that are still as old; the sizes of what went."""
    looked_at = await asyncio.gather(*(store.head(orphan.key) for orphan in orphans))
    gone = [
        orphan
        for orphan, current in zip(orphans, looked_at, strict=True)
        if current is not None and current.modified_at < before
    ]
    await store.delete([orphan.key for orphan in gone])
    return [orphan.size for orphan in gone]


def _subject_of(key: str) -> UUID | None:
    if (document := parse_key(key)) is not None:
        return document.document_id
    photo = parse_photo_key(key)
    return photo.photo_id if photo is not None else None


async def _without_row(batch: list[tuple[ObjectInfo, UUID]], known: KnownSubjects) -> list[ObjectInfo]:
    if not batch:
        return []
    rows = await known(list({subject for _, subject in batch}))
    return [info for info, subject in batch if subject not in rows]
