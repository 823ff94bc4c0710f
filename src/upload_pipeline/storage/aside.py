"""Removing objects that may come into use at any moment: moved aside, asked about again, then brought back or deleted.

What holds at every instant: **no bytes are deleted unless the database was asked about their key, and knew of nobody
who has or awaits them, after they had left it.** So whoever makes a row has either made it before that question, and
the bytes come back, or makes it after, and finds the key empty when it looks: an intake puts its copy there once its
row stands (`intake.placing.confirm_placed`), a job waits for bytes that are announced. To look once more at the
object's age, however late, gives neither: between the look and the deletion there is always room for a row.

The key that bytes have meanwhile names the one that they had. So those of a process that died in between are brought
to their end by the next sweep (`settle`), whatever the database says by then. It is drawn anew each time, so
that nobody deletes what another has moved aside since, whose question may have another answer; and for `HELD` it
belongs to whoever has drawn it.

Bytes that come back do not replace any that have come under their key meanwhile: those are the newer ones. Where such
a PUT ends in the instant between the look and the move, the older ones win: for all keys but those of a client's wrong
bytes they are the same, and of wrong bytes the job says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from datetime import timedelta
from typing import TypeVar
from uuid import UUID, uuid4

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.keys import INCOMING_PREFIX, parse_key
from upload_pipeline.storage.photo_keys import parse_photo_key
from upload_pipeline.storage.store import ObjectStore

HELD = timedelta(minutes=10)
"""How long bytes may be aside before whoever moved them there is taken for dead: several times the bounds of what it
waits for."""

_JOINT = "__"
"""For the slashes of a key: no key of a document or a photo has it, and the store needs no folders for it."""

T = TypeVar("T")

WantedKeys = Callable[[Collection[str]], Awaitable[set[str]]]
"""Which of these keys have a row that has, or awaits, bytes there."""


def aside_key(key: str, withdrawal: UUID) -> str:
    """Where the bytes of a document's or photo's key are while it is asked whether they are wanted."""
    return f"{INCOMING_PREFIX}/{withdrawal}{_JOINT}{key.replace('/', _JOINT)}"


def key_of_aside(key: str) -> str | None:
    """The key that the bytes had, `None` where `aside_key` would not make this one."""
    prefix, _, name = key.partition("/")
    withdrawal, joint, rest = name.partition(_JOINT)
    original = rest.replace(_JOINT, "/")
    if prefix != INCOMING_PREFIX or not joint or "/" in name:
        return None
    try:
        if str(UUID(withdrawal)) != withdrawal:
            return None
    except ValueError:
        return None
    ours = parse_key(original) is not None or parse_photo_key(original) is not None
    return original if ours else None


async def withdraw(store: ObjectStore, keys: Collection[str], wanted: WantedKeys) -> set[str]:
    """Removes objects that nobody wants. Safe to repeat, and beside others.

    Args:
        store: where they are.
        keys: of documents or photos; those that are missing are fine.
        wanted: is asked before anything moves, and once more after.

    Returns:
        The keys of what was removed.

    Raises:
        PipelineError: as the store does, or `wanted`; the bytes are then back, or left for `settle`.
    """
    needed = await wanted(keys)
    asides = {aside_key(key, uuid4()): key for key in keys if key not in needed}
    try:
        moved = await _all_ended(_moved(store, key, aside) for aside, key in asides.items())
        asides = {aside: key for (aside, key), there in zip(asides.items(), moved, strict=True) if there}
        needed = await wanted(list(asides.values()))
    except BaseException:
        # Cancelled or not: nobody has said that the bytes are not wanted.
        await asyncio.shield(asyncio.create_task(_all_back(store, asides)))
        raise
    return await _end(store, asides, needed)


async def settle(store: ObjectStore, asides: Collection[str], wanted: WantedKeys) -> set[str]:
    """Ends what processes that died had moved aside, at least `HELD` ago: wanted bytes come back, others go.

    Args:
        store: where they are.
        asides: keys of `aside_key`.
        wanted: tells which of the keys that they had are wanted.

    Returns:
        Those of the asides that were removed.

    Raises:
        PipelineError: as the store does, or `wanted`.
    """
    originals = {aside: key for aside in asides if (key := key_of_aside(aside)) is not None}
    gone = await _end(store, originals, await wanted(set(originals.values())))
    return {aside for aside, key in originals.items() if key in gone}


async def _end(store: ObjectStore, asides: Mapping[str, str], needed: set[str]) -> set[str]:
    """The keys whose bytes went."""
    await _all_back(store, {aside: key for aside, key in asides.items() if key in needed})
    await store.delete([aside for aside, key in asides.items() if key not in needed])
    return {key for key in asides.values() if key not in needed}


async def _all_back(store: ObjectStore, asides: Mapping[str, str]) -> None:
    await _all_ended(_back(store, aside, key) for aside, key in asides.items())


async def _all_ended(works: Iterable[Awaitable[T]]) -> list[T]:
    """What all give; where one fails, its failure, once none is under way any more."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def _back(store: ObjectStore, aside: str, key: str) -> None:
    if await store.head(key) is not None:
        await store.delete([aside])
    else:
        await _moved(store, aside, key)


async def _moved(store: ObjectStore, source: str, target: str) -> bool:
    """Moves an object; whether it was there."""
    try:
        await store.move(source, target)
    except PipelineError as error:
        if error.code is ErrorCode.OBJECT_MISSING:
            return False
        raise
    return True
