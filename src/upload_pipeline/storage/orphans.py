"""What a crash leaves in the store: objects without a document or a photo, uploads that never ended, writes cut short.

An object is written before its row, so a process that dies in between leaves an object that nothing names. It
is left alone for a grace time, in which its row may still come. It may come much later too: the same user's same bytes
have the same key whenever they are sent. So an orphan is removed as everything is that may come into use (`aside`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from upload_pipeline.storage.aside import HELD, key_of_aside, settle, withdraw
from upload_pipeline.storage.keys import is_incoming_key, parse_key
from upload_pipeline.storage.objects import ObjectInfo
from upload_pipeline.storage.photo_keys import parse_photo_key
from upload_pipeline.storage.store import ObjectStore

LOOKUP_BATCH = 500
"""Ids that one lookup asks for."""

ROUND = 10_000
"""Orphans that one round removes at most, and so holds in memory."""

REMOVED_AT_ONCE = 32
"""Orphans that are removed at the same time."""

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


@dataclass(slots=True)
class Survey:
    """What a look through the store has found.

    Attributes:
        orphans: what may be removed: at most `ROUND` of what is old enough.
        aside: what a process that died had moved aside.
        with_row: how many objects of documents and photos have a row.
        without_row: how many have none.
    """

    orphans: list[ObjectInfo] = field(default_factory=list)
    aside: list[ObjectInfo] = field(default_factory=list)
    with_row: int = 0
    without_row: int = 0


async def survey(
    listing: AsyncIterator[ObjectInfo],
    known: KnownSubjects,
    *,
    now: datetime,
    grace: timedelta,
    young_too: bool = False,
) -> Survey:
    """Finds the objects of a listing that nothing will ever name.

    That is: written more than `grace` ago and either an upload under `incoming/` or of a document or a photo that
    has no row. Keys of any other form are somebody else's and never in it.

    Args:
        listing: objects in any order; read a batch at a time, never held whole.
        known: tells which documents and photos have a row.
        now: the time, with time zone.
        grace: how old an orphan must be.
        young_too: whether younger objects are counted as well, with and without a row.
    """
    found = Survey()
    batch: list[tuple[ObjectInfo, UUID]] = []

    async def look_up() -> None:
        rows = await known(list({subject for _, subject in batch})) if batch else set()
        for info, subject in batch:
            if subject in rows:
                found.with_row += 1
            else:
                found.without_row += 1
                note(info)
        batch.clear()

    def note(info: ObjectInfo) -> None:
        if info.modified_at < now - grace and len(found.orphans) < ROUND:
            found.orphans.append(info)

    async for info in listing:
        if is_incoming_key(info.key):
            note(info)
        elif key_of_aside(info.key) is not None:
            if info.modified_at < now - min(grace, HELD) and len(found.aside) < ROUND:
                found.aside.append(info)
        elif (young_too or info.modified_at < now - grace) and (subject := _subject_of(info.key)) is not None:
            batch.append((info, subject))
            if len(batch) == LOOKUP_BATCH:
                await look_up()
    await look_up()
    return found


async def sweep(
    store: ObjectStore,
    known: KnownSubjects,
    *,
    now: datetime,
    grace: timedelta,
    permit: Callable[[Survey], Awaitable[bool]] | None = None,
    young_too: bool = False,
) -> Swept:
    """Removes the orphans of a store and the files of writes that were cut short, a bounded number in a round.

    Safe to repeat, to break off and to run twice at once.

    Args:
        store: the store.
        known: tells which documents and photos have a row.
        now: the time, with time zone, by the clock that the store stamps objects with.
        grace: how old an orphan must be; far longer than an intake takes from its first byte to its commit.
        permit: is shown what was found before any of it is touched; where it says no, nothing is removed.
        young_too: as for `survey`.

    Raises:
        PipelineError: as the store's methods do; what was removed until then stays removed.
    """
    found = await survey(store.list(), known, now=now, grace=grace, young_too=young_too)
    if permit is not None and not await permit(found):
        return Swept(0, 0, 0)
    removed: list[int] = []
    for batch in _batched(found.orphans, REMOVED_AT_ONCE):
        removed += await _remove(store, batch, known, before=now - grace)
    for batch in _batched(found.aside, REMOVED_AT_ONCE):
        removed += await _settle(store, batch, known)
    return Swept(len(removed), sum(removed), await store.remove_unfinished(now - grace))


def _batched(items: list[ObjectInfo], size: int) -> Iterator[list[ObjectInfo]]:
    """The items in lists of that size; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


async def _remove(
    store: ObjectStore, orphans: list[ObjectInfo], known: KnownSubjects, *, before: datetime
) -> list[int]:
    """Removes those that nobody wants and that are still as old; the sizes of what went."""
    looked_at = await asyncio.gather(*(store.head(orphan.key) for orphan in orphans))
    # What was uploaded anew since the listing is spared a move, which is no more than a courtesy.
    sizes = {
        orphan.key: orphan.size
        for orphan, current in zip(orphans, looked_at, strict=True)
        if current is not None and current.modified_at < before
    }
    uploads = {key for key in sizes if is_incoming_key(key)}
    await store.delete(uploads)
    gone = await withdraw(store, sizes.keys() - uploads, _wanted(known))
    return [sizes[key] for key in uploads | gone]


async def _settle(store: ObjectStore, left: list[ObjectInfo], known: KnownSubjects) -> list[int]:
    sizes = {info.key: info.size for info in left}
    return [sizes[aside] for aside in await settle(store, sizes.keys(), _wanted(known))]


def _wanted(known: KnownSubjects) -> Callable[[Collection[str]], Awaitable[set[str]]]:
    async def wanted(keys: Collection[str]) -> set[str]:
        subjects = {key: _subject_of(key) for key in keys}
        asked = {subject for subject in subjects.values() if subject is not None}
        rows = await known(list(asked)) if asked else set()
        return {key for key, subject in subjects.items() if subject in rows}

    return wanted


def _subject_of(key: str) -> UUID | None:
    if (document := parse_key(key)) is not None:
        return document.document_id
    photo = parse_photo_key(key)
    return photo.photo_id if photo is not None else None
