"""A round of sweeping the store: whether this database may, and what came of it. Any worker does it for all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import structlog

from upload_pipeline.database import documents, photos
from upload_pipeline.database.queue import Executor
from upload_pipeline.database.upkeep_rounds import claim_upkeep, is_store_mark, mark_store, note_upkeep
from upload_pipeline.storage.orphans import Survey, Swept, sweep
from upload_pipeline.storage.store import ObjectStore
from upload_pipeline.storage.store_mark import read_mark, too_many, write_mark

log = structlog.get_logger(__name__)

SWEEP = "sweep"
"""The name of these rounds among the upkeep that one worker does for all."""

_REMEDY = (
    "Nothing was removed. Where the files in the store are not this database's, give it a STORAGE_URL of its own. "
    "Where they are, as after a restored backup, `upload-pipeline maintenance --adopt-store` takes the store for its "
    "own, and removes every file that has no row in it."
)


@dataclass(frozen=True, slots=True)
class SweepRound:
    """What a round came to; `refusal` says why it removed nothing, with the remedy, and is None where it could."""

    swept: Swept
    refusal: str | None = None


async def sweep_when_due(db: Executor, store: ObjectStore, *, grace: timedelta, interval: timedelta) -> SweepRound:
    """A round where none was begun within the interval by anybody; otherwise nothing."""
    if not await claim_upkeep(db, SWEEP, interval):
        return SweepRound(Swept(0, 0, 0))
    return await sweep_store(db, store, grace=grace)


async def sweep_store(db: Executor, store: ObjectStore, *, grace: timedelta) -> SweepRound:
    """Removes what has no row, unless the store is another database's or far too much has none.

    Raises:
        PipelineError: as the store does.
    """
    found = await read_mark(store)
    own = found.value if found is not None and found.value and await is_store_mark(db, found.value) else None
    refusal = None
    swept = Swept(0, 0, 0)
    if found is not None and own is None:
        refusal = "the store bears the mark of another database, or of this one as it was after its backup"
    else:

        async def permit(seen: Survey) -> bool:
            nonlocal refusal
            refusal = too_many(seen, marked=own is not None)
            if refusal is None:
                await write_mark(store, await mark_store(db, own))
            return refusal is None

        swept = await _swept(db, store, grace, permit=permit, young_too=own is None)
    if refusal is not None:
        refusal = f"{refusal}. {_REMEDY}"
        log.error("sweep_refused", reason=refusal)
    await note_upkeep(db, SWEEP, refusal)
    return SweepRound(swept, refusal)


async def adopt_store(db: Executor, store: ObjectStore, *, grace: timedelta) -> SweepRound:
    """Takes the store for this database's own, whatever its mark says, and removes what has no row, however much.

    Raises:
        PipelineError: as the store does.
    """
    await write_mark(store, await mark_store(db, None))
    objects = size = unfinished = 0
    while True:
        swept = await _swept(db, store, grace)
        objects, size, unfinished = objects + swept.objects, size + swept.object_bytes, unfinished + swept.unfinished
        if not swept.objects:
            break
    await note_upkeep(db, SWEEP, None)
    return SweepRound(Swept(objects, size, unfinished))


async def _swept(
    db: Executor,
    store: ObjectStore,
    grace: timedelta,
    *,
    permit: Callable[[Survey], Awaitable[bool]] | None = None,
    young_too: bool = False,
) -> Swept:
    async def known(subject_ids: list[UUID]) -> set[UUID]:
        found = await documents.existing_documents(db, subject_ids)
        return found | await photos.existing_photos(db, [each for each in subject_ids if each not in found])

    now = await store.time()
    swept = await sweep(store, known, now=now, grace=grace, permit=permit, young_too=young_too)
    if swept.objects:
        await db.fetchval(
            """
            select upload_pipeline.record_event('orphan_removed', p_payload => jsonb_build_object('objects', $1::int))
            """,
            swept.objects,
        )
    return swept
