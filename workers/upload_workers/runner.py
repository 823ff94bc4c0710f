"""The runner: claims jobs, leads them, keeps their leases, and stops when told.

    running ──stop()──▶ draining ──steps finished, or grace over──▶ releasing ──▶ stopped
       claims, leads       no claims; a job is given back at its       what is still held is
                           next step boundary                          cancelled and handed back

A worker serves a pool as far as it has what that pool's jobs need. Where a job was put off since another worker has it
and this one has not, it leaves the pool to others, instead of claiming the same jobs again and again, until it lacks
nothing any more; and it looks again after a while, since an operator may have moved those jobs to another pool.

Jobs of the pool `background`, which nobody waits for, get at most half of a worker's slots beside other pools.

How many jobs are at work is bounded by `concurrency`; what they ask of the queue within a few milliseconds shares a
statement (`grouping`). No exception of a job, of the database or of the network ends the runner.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import structlog

from upload_pipeline.database import queue
from upload_pipeline.stages import BACKGROUND_POOL
from upload_workers.grouping import GroupedAdvances
from upload_workers.lead import JobLeader
from upload_workers.metrics import WorkerMetrics
from upload_workers.wake import AdaptivePoll

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from uuid import UUID

    from upload_pipeline.database.queue import ClaimedJob, Executor
    from upload_workers.leases import LeaseKeeper
    from upload_workers.steps import Lacking, Step, StepContext

log = structlog.get_logger(__name__)

RELEASE_TIMEOUT = 2.0
"""Seconds that a stopping worker has, beyond its grace, to hand jobs back; what is left then is left to its lease."""

LEAVE_SECONDS = 600.0
"""After which a pool is served again that was left to other workers; if that is still no use, it is left again."""

CLAIM_LIMIT = 200
"""Most jobs asked for in one claim; beyond that a claim only gets longer, not cheaper per job."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """A claim under way: when it was sent (monotonic seconds), for how many jobs, and what will come back."""

    sent: float
    limit: int
    answer: asyncio.Task[list[ClaimedJob]]


@dataclass
class Runner:
    """One worker: serves `pools` with at most `concurrency` jobs at once.

    Attributes:
        has_room: whether jobs may be claimed now; what is at work goes on in any case.
        metrics: where claims, steps and refused writes are counted.
    """

    worker_id: UUID
    db: Executor
    context: StepContext
    steps: Mapping[tuple[str, str], Step]
    next_stages: Mapping[tuple[str, str], str]
    keeper: LeaseKeeper
    pools: Sequence[str]
    concurrency: int
    lease_ttl: float
    group_window: float
    poll: AdaptivePoll
    has_room: Callable[[], bool] = lambda: True
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    claimed: int = 0
    ended: int = 0
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[Lacking | None]] = field(default_factory=set)
    _background: set[asyncio.Task[Lacking | None]] = field(default_factory=set)
    _left: dict[str, tuple[Lacking, float]] = field(default_factory=dict)  # and until when, by the monotonic clock
    _told_left: list[str] = field(default_factory=list)  # what the register says of that
    _cursors: dict[str, UUID] = field(default_factory=dict)
    _rounds: int = 0
    _claiming: asyncio.Task[None] | None = None
    _watching: asyncio.Task[None] | None = None

    @property
    def at_work(self) -> int:
        """How many jobs are being led now."""
        return len(self._tasks)

    @property
    def left_pools(self) -> list[str]:
        """Pools that are left to other workers for now, since this one lacks what their jobs need."""
        return sorted(self._left)

    @property
    def stopping(self) -> bool:
        """Whether stop() was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """No more claims; jobs are given back at their next step boundary. Safe to call again."""
        self._stopping.set()
        self.wake.set()

    def start(self) -> None:
        """Begins to claim and to lead, on the running event loop."""
        self._watching = asyncio.create_task(self._watch_trust(), name="trust")
        self._claiming = asyncio.create_task(self._claim_until_stopped(), name="runner")

    async def drain(self, grace: float) -> None:
        """Lets running steps finish for `grace` seconds, then hands back what is left. Ends in bounded time.

        Leases are kept and trust is watched until the last job is gone.
        """
        self.stop()
        until = time.monotonic() + grace
        if self._claiming is not None:
            # A claim under way is waited for: cancelled, it may have leased jobs that nobody then knows of.
            _, late = await asyncio.wait({self._claiming}, timeout=max(grace, RELEASE_TIMEOUT))
            for claiming in late:
                claiming.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=max(0.0, until - time.monotonic()))
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=RELEASE_TIMEOUT)
        if self._watching is not None:
            self._watching.cancel()

    async def _claim_until_stopped(self) -> None:
        ttl = timedelta(seconds=self.lease_ttl)
        leader = JobLeader(
            self.db,
            self.context,
            self.steps,
            self.next_stages,
            self.keeper,
            GroupedAdvances(self.db, ttl, self.group_window),
            ttl,
            self._stopping.is_set,
            self.metrics,
        )
        outage = 0.5
        while not self.stopping:
            # Cleared before the look and not after, so that a wake-up during the look is not lost.
            self.wake.clear()
            await self._tell_left()
            try:
                found = await self._claim_round(leader, ttl)
                outage = 0.5
            except Exception as error:  # noqa: BLE001 - the database is away; the runner is not to end for that
                log.warning("claim_failed", error=str(error) or type(error).__name__, retry_in=outage)
                await self._sleep(outage * random.uniform(0.8, 1.2))  # noqa: S311
                outage = min(outage * 2, 10.0)
                continue
            if found:
                self.poll.found_work()
            else:
                await self._idle()

    async def _claim_round(self, leader: JobLeader, ttl: timedelta) -> bool:
        """Fills the free slots from each pool; True if there may be more to claim at once."""
        found = False
        # Each round begins with another pool, so that one with work without end does not starve the others.
        first = self._rounds % len(self.pools)
        self._rounds += 1
        for pool in (*self.pools[first:], *self.pools[:first]):
            await self._come_back(pool)
            claim = self._ask(pool, self.concurrency - self.at_work, ttl)
            while claim is not None:
                try:
                    jobs = await claim.answer
                except BaseException:
                    self.metrics.claimed(pool, None)
                    raise
                self.metrics.claimed(pool, len(jobs))
                more = None
                if jobs:
                    found = True
                    self._cursors[pool] = jobs[-1].user_id
                    if len(jobs) == claim.limit:
                        # There may be more: the next claim is on its way while the jobs of this one are begun.
                        more = self._ask(pool, self.concurrency - self.at_work - len(jobs), ttl, coming=len(jobs))
                        await asyncio.sleep(0)
                    self._begin(leader, jobs, claim.sent, pool)
                claim = more
        if self.at_work >= self.concurrency:
            await self._wait_for_slots()
        return found

    def _ask(self, pool: str, free: int, ttl: timedelta, *, coming: int = 0) -> _Claim | None:
        """Sends a claim for up to `free` jobs; None where there is nothing to ask for.

        Args:
            coming: jobs of this pool that were claimed and are not begun yet.
        """
        if pool == BACKGROUND_POOL and len(self.pools) > 1:
            free = min(free, max(1, self.concurrency // 2) - len(self._background) - coming)
        if free <= 0 or self.stopping or pool in self._left or not self.has_room():
            return None
        limit = min(free, CLAIM_LIMIT)
        answer = queue.claim_jobs(
            self.db, worker_id=self.worker_id, pool=pool, limit=limit, after_user=self._cursors.get(pool), ttl=ttl
        )
        return _Claim(time.monotonic(), limit, asyncio.create_task(answer))

    def _begin(self, leader: JobLeader, jobs: list[ClaimedJob], sent: float, pool: str) -> None:
        for job in jobs:
            held = self.keeper.hold(job.lease, sent=sent)
            held.task = asyncio.create_task(leader.lead(job, held))
            self._tasks.add(held.task)
            if pool == BACKGROUND_POOL:
                self._background.add(held.task)
            held.task.add_done_callback(partial(self._job_ended, pool))
        self.claimed += len(jobs)

    async def _wait_for_slots(self) -> None:
        """Until a slot is free, and then a moment more, so that slots that come free together are filled together."""
        while self.at_work >= self.concurrency and not self.stopping:
            self.wake.clear()
            await self.wake.wait()
        if self.group_window and not self.stopping:
            await asyncio.sleep(self.group_window)

    def _job_ended(self, pool: str, task: asyncio.Task[Lacking | None]) -> None:
        self._tasks.discard(task)
        self._background.discard(task)
        self.ended += 1
        # A free slot, and perhaps a lane below its cap again.
        self.wake.set()
        if task.cancelled():
            return
        if task.exception() is not None:
            log.error("leader_crashed", error=repr(task.exception()))
            return
        lacking = task.result()
        if lacking is not None and pool not in self._left:
            self._left[pool] = (lacking, time.monotonic() + LEAVE_SECONDS)
            log.warning("pool_left_to_others", pool=pool, seconds=LEAVE_SECONDS)

    async def _come_back(self, pool: str) -> None:
        """Serves a pool again that was left, where nothing is lacking any more or it is time to look."""
        if pool not in self._left:
            return
        lacking, until = self._left[pool]
        if time.monotonic() >= until or not await lacking():
            del self._left[pool]
            log.info("pool_served_again", pool=pool)

    async def _tell_left(self) -> None:
        """Has the register say what is left to others: who looks for a standstill looks there, and at its events."""
        left = self.left_pools
        if left == self._told_left:
            return
        try:
            await queue.leave_pools(self.db, worker_id=self.worker_id, left_pools=left)
        except Exception as error:  # noqa: BLE001 - told in the next round
            log.warning("left_pools_not_told", error=str(error) or type(error).__name__)
        else:
            self._told_left = left

    async def _idle(self) -> None:
        if await self._sleep(self.poll.next_wait()):
            # Woken, a claim may find nothing all the same: it passes over a lane that an enqueue or another claim has
            # locked. What is in that lane is then found at the shortest wait, and not at the one of an idle worker.
            self.poll.found_work()

    async def _sleep(self, seconds: float) -> bool:
        """Until woken, or so long; whether it was woken."""
        try:
            await asyncio.wait_for(self.wake.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _watch_trust(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.lease_ttl / 20))
            self.keeper.check_trust()
