"""Upkeep: what any worker does for all of them. There is no leader; each round is bounded and safe beside others.

every second or so      due retries and snoozes become ready
every two seconds       batches whose last file has come to its end are noted; jobs that fill a new embedding model are
                        made, and vectors moved or removed after a change of models
every quarter lease     jobs whose lease ran out are taken back
every minute            what parses cost that were left behind
SWEEP_INTERVAL          orphaned objects: one worker of all looks through the whole store (`sweeping`)
MAINTENANCE_INTERVAL    event partitions, silent workers, deletions that a crash cut short, photos that never came,
                        temporary files that a killed process left; sessions that are long over; vectors in the cache
                        that nobody uses; how long the stages take is measured anew
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from upload_pipeline.database import queue
from upload_pipeline.database.batches import note_completed_batches
from upload_pipeline.database.deletion import finish_deletions
from upload_pipeline.database.documents import DeletedDocument
from upload_pipeline.database.embedding_cache import forget_unused_vectors
from upload_pipeline.database.embedding_models import enqueue_refills, settle_models
from upload_pipeline.database.photo_deletion import expire_photos, finish_photo_deletions
from upload_pipeline.database.photos import DeletedPhoto
from upload_pipeline.database.queue import Executor
from upload_pipeline.database.sessions import clean_sessions
from upload_pipeline.storage.document_objects import remove_document_objects
from upload_pipeline.storage.orphans import Swept
from upload_pipeline.storage.photo_objects import remove_photo_objects
from upload_pipeline.storage.store import ObjectStore
from upload_workers.sweeping import SweepRound, adopt_store, sweep_store, sweep_when_due

log = structlog.get_logger(__name__)

T = TypeVar("T")

PROMOTE_INTERVAL = 1.0
NOTE_INTERVAL = 2.0
MODEL_INTERVAL = 2.0
ACCOUNT_INTERVAL = 60.0
MODEL_TURNS = 20
"""Most statements about embedding models in a row, so that a change of millions of vectors leaves room for the rest."""
BATCH = 100
"""Jobs that one statement promotes or takes back."""

CACHE_LIFE = timedelta(days=90)
"""How long a vector that was paid for is kept unused, where no setting says."""

_CACHE_BATCH = 1000  # vectors that one statement forgets
_CACHE_BATCHES = 20  # such statements in a round


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one round of maintenance did."""

    partitions_made: int
    workers_forgotten: int
    deletions_finished: int
    photos_expired: int
    orphans_removed: int
    orphan_bytes: int
    unfinished_writes_removed: int
    sweep_refused: str | None
    scratch_removed: int
    durations_measured: int
    sessions_removed: int
    session_documents_removed: int
    vectors_forgotten: int


async def maintain(
    db: Executor,
    store: ObjectStore,
    scratch: Path,
    *,
    orphan_grace: timedelta,
    session_grace: timedelta,
    cache_life: timedelta = CACHE_LIFE,
    sweep_interval: timedelta | None = None,
    adopt: bool = False,
) -> MaintenanceReport:
    """One round of maintenance. Safe to repeat and beside other rounds.

    Args:
        scratch: the directory of workers' temporary files.
        orphan_grace: how old an object without a document, or a temporary file, must be to be removed; and how long
            after its deadline a photo that never came is.
        session_grace: how long a session must be over for its documents to be deleted.
        cache_life: how long a vector that was paid for is kept unused.
        sweep_interval: the store is looked through where nobody has begun to within it; None: in any case.
        adopt: takes the store for this database's whatever speaks against it.

    Raises:
        Exception: the first one that a part of the round raised; the other parts were done nevertheless.
    """
    now = datetime.now(UTC)
    failures: list[Exception] = []

    async def part(work: Awaitable[T], otherwise: T) -> T:
        try:
            return await work
        except Exception as error:  # noqa: BLE001 - raised when the other parts are done
            failures.append(error)
            return otherwise

    partitions = await part(db.fetchval("select upload_pipeline.ensure_event_partitions()"), 0)
    forgotten = await part(db.fetchval("select upload_pipeline.forget_lost_workers()"), 0)
    sessions_removed, session_documents = await part(clean_sessions(db, session_grace), (0, 0))
    vectors = await part(_forget_vectors(db, cache_life), 0)
    finished = await part(_finish_deletions(db, store, now), 0)
    finished += await part(_finish_photo_deletions(db, store, now), 0)
    expired = await part(_expire_photos(db, store, orphan_grace), 0)
    if adopt:
        sweeping = adopt_store(db, store, grace=orphan_grace)
    elif sweep_interval is None:
        sweeping = sweep_store(db, store, grace=orphan_grace)
    else:
        sweeping = sweep_when_due(db, store, grace=orphan_grace, interval=sweep_interval)
    swept = await part(sweeping, SweepRound(Swept(0, 0, 0)))
    measured = await part(db.fetchval("select upload_pipeline.refresh_stage_durations()"), 0)
    cleared = await part(asyncio.to_thread(_clear_scratch, scratch, older_than=orphan_grace), 0)
    if failures:
        for error in failures[1:]:
            log.warning("maintenance_failed", error=str(error) or type(error).__name__)
        raise failures[0]
    return MaintenanceReport(
        int(partitions),
        int(forgotten),
        finished,
        expired,
        swept.swept.objects,
        swept.swept.object_bytes,
        swept.swept.unfinished,
        swept.refusal,
        cleared,
        int(measured),
        sessions_removed,
        session_documents,
        vectors,
    )


async def _forget_vectors(db: Executor, unused: timedelta) -> int:
    """As many as a round may take; the others go in the next."""
    total = 0
    for _ in range(_CACHE_BATCHES):
        forgotten = await forget_unused_vectors(db, unused, limit=_CACHE_BATCH)
        total += forgotten
        if forgotten < _CACHE_BATCH:
            break
    return total


async def _finish_deletions(db: Executor, store: ObjectStore, now: datetime) -> int:
    async def remove_objects(deleted: DeletedDocument) -> None:
        await remove_document_objects(store, document_id=deleted.document_id, raw_key=deleted.raw_key)

    # A deletion that is under way elsewhere is not taken for one that was cut short.
    return await finish_deletions(db, before=now - timedelta(minutes=1), remove_objects=remove_objects)


async def _finish_photo_deletions(db: Executor, store: ObjectStore, now: datetime) -> int:
    return await finish_photo_deletions(
        db, before=now - timedelta(minutes=1), remove_objects=partial(_remove_photo, store)
    )


async def _expire_photos(db: Executor, store: ObjectStore, grace: timedelta) -> int:
    return await expire_photos(db, grace=grace, remove_objects=partial(_remove_photo, store))


async def _remove_photo(store: ObjectStore, deleted: DeletedPhoto) -> None:
    await remove_photo_objects(store, deleted.raw_key)


@dataclass(frozen=True, slots=True)
class Upkeep:
    """The upkeep that runs beside a worker's jobs; intervals in seconds.

    Attributes:
        wake: called when jobs became ready, so that this worker looks at once.
        account: records what parses cost that were left behind; None where there is no hosted parser.
    """

    db: Executor
    store: ObjectStore
    scratch: Path
    lease_ttl: float
    maintenance_interval: float
    orphan_grace: float
    session_grace: float
    wake: Callable[[], None]
    sweep_interval: float = 1800.0
    cache_life: timedelta = CACHE_LIFE
    account: Callable[[], Awaitable[None]] | None = None

    async def run(self) -> None:
        """Runs until cancelled."""
        also = [] if self.account is None else [self._every(ACCOUNT_INTERVAL, self.account)]
        await asyncio.gather(
            *also,
            self._every(PROMOTE_INTERVAL, self._promote),
            self._every(NOTE_INTERVAL, self._note_batches),
            self._every(MODEL_INTERVAL, self._tend_models),
            self._every(self.lease_ttl / 4, self._reap),
            self._every(self.maintenance_interval, self._maintain),
        )

    async def _every(self, interval: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            # Spread by a fifth, so that workers do not do it all at once.
            await asyncio.sleep(interval * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - upkeep is tried again, and never ends a worker
                log.warning("upkeep_failed", work=work.__name__, error=str(error) or type(error).__name__)

    async def _promote(self) -> None:
        promoted = BATCH
        while promoted == BATCH:
            promoted = await queue.promote_due(self.db, limit=BATCH)
            if promoted:
                self.wake()

    async def _note_batches(self) -> None:
        for batch in await note_completed_batches(self.db):
            log.info(
                "batch_completed",
                batch_id=batch.batch_id,
                user_id=batch.user_id,
                correlation_id=batch.correlation_id,
                status=batch.status,
                total=batch.total,
                processed=batch.processed,
                failed=batch.failed,
                seconds=round(batch.seconds, 3),
            )

    async def _tend_models(self) -> None:
        for _ in range(MODEL_TURNS):
            jobs, more = await enqueue_refills(self.db)
            if jobs:
                self.wake()
            if not more:
                break
        for _ in range(MODEL_TURNS):
            if not await settle_models(self.db):
                break

    async def _reap(self) -> None:
        reaped = BATCH
        while reaped == BATCH:
            reaped = await queue.reap_expired(self.db, limit=BATCH)
            if reaped:
                log.warning("leases_reaped", jobs=reaped)

    async def _maintain(self) -> None:
        report = await maintain(
            self.db,
            self.store,
            self.scratch,
            orphan_grace=timedelta(seconds=self.orphan_grace),
            session_grace=timedelta(seconds=self.session_grace),
            cache_life=self.cache_life,
            # Further apart than the grace, and what is old enough to be removed could be younger than the store's last
            # mark; half of it, so that a round which fails or comes late does no harm.
            sweep_interval=timedelta(seconds=min(self.sweep_interval, self.orphan_grace / 2)),
        )
        log.debug("maintained", report=report)


def _clear_scratch(scratch: Path, *, older_than: timedelta) -> int:
    removed = 0
    for left in scratch.glob("job-*"):
        try:
            if left.stat().st_mtime < time.time() - older_than.total_seconds():
                shutil.rmtree(left)
                removed += 1
        except FileNotFoundError:
            continue  # its own process, or another round, was faster
        except OSError as error:
            log.warning("scratch_not_removed", path=str(left), error=str(error))
    return removed
