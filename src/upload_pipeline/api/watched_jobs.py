"""Which jobs the database notifies this process of, and for which of them it may rely on that.

A job is watched from the moment at which its row of `job_watches` is committed. A transaction that was under way then
may have looked for watchers before, and commits its events without a word. So a job is *told* only once every
transaction has ended that was older than a number drawn after that moment; until then, and while nothing listens, its
events are asked for at short intervals.

    watched ──a look that every older transaction precedes──▶ told ──the listener is lost, the watch ran out──▶ neither
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from upload_pipeline.database.job_watches import newest_transaction, unwatch_jobs, watch_jobs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from uuid import UUID

    from upload_pipeline.database.queue import Executor

TTL = 60.0
"""Seconds that a watch lasts unless it is renewed; what a killed process leaves behind goes after that."""

_RENEWED_AFTER = TTL / 3
_TRUSTED_FOR = TTL * 0.9


class WatchedJobs:
    """The watches of one process. All but `proved` and `lost` are called by one task.

    Args:
        db: of role `upload_worker`.
    """

    def __init__(self, db: Executor) -> None:
        self._db = db
        self._watcher_id = uuid4()
        # The number that must be passed before a job is told; None once it is.
        self._watched: dict[UUID, int | None] = {}
        self._renewed = 0.0
        self._listens = 0
        self._listening = False

    def __len__(self) -> int:
        """How many jobs are watched."""
        return len(self._watched)

    @property
    def listening(self) -> bool:
        """Whether notifications arrive."""
        return self._listening

    def proved(self) -> None:
        """From now on notifications arrive."""
        self._listening = True

    def lost(self) -> None:
        """Notifications may have been missed: nothing that was watched counts."""
        self._listening = False
        self._listens += 1
        self._watched.clear()

    def told(self, job_id: UUID) -> bool:
        """Whether a notification comes whenever the job has news."""
        return self._watched.get(job_id, 0) is None

    async def keep(self, wanted: Collection[UUID]) -> None:
        """Watches these jobs and no others: new ones in one statement, all of them anew where it is time for that."""
        if not self._listening:
            return
        now = time.monotonic()
        if now > self._renewed + _TRUSTED_FOR:
            self._watched.clear()
        listens = self._listens
        if dropped := self._watched.keys() - wanted:
            await unwatch_jobs(self._db, self._watcher_id, dropped)
            for job_id in dropped:
                self._watched.pop(job_id, None)
        new = set(wanted) - self._watched.keys()
        renew = now > self._renewed + _RENEWED_AFTER
        if not new and not (renew and wanted):
            return
        await watch_jobs(self._db, self._watcher_id, wanted if renew else new, ttl=timedelta(seconds=TTL))
        horizon = await newest_transaction(self._db) if new else 0
        if listens != self._listens:
            return
        if renew:
            self._renewed = now
        self._watched.update(dict.fromkeys(new, horizon))

    def looked(self, job_ids: Iterable[UUID], oldest_running: int) -> None:
        """A look at these jobs, begun after the last `keep`, has seen all transactions older than that."""
        for job_id in job_ids:
            horizon = self._watched.get(job_id)
            if horizon is not None and oldest_running >= horizon:
                self._watched[job_id] = None

    async def end(self) -> None:
        """Watches nothing more."""
        self._watched.clear()
        await unwatch_jobs(self._db, self._watcher_id)
