"""Keeping leases: the heartbeat of a worker, and the moment at which it stops trusting itself.

A worker may write for a job only while it holds the job's lease. The database is the only judge of that: every
write names the token, and a stale one writes nothing. What is kept here spares work that cannot be written any
more, and it must hold when this process is the one that misbehaves:

- The heartbeat runs in a thread with an event loop and a connection of its own, so that a busy event loop or a parse
  that burns the CPU cannot starve it. Every wait of it ends by a timer of this process, since a dead peer ends none.
- A job is trusted until `sent + ttl - margin` on the monotonic clock, where `sent` is when its last successful claim
  or renewal was *sent*: a slow answer does not stretch the lease, and neither does a change of the wall clock. The
  margin makes the worker stop before the database gives the job to another.
- The event loop checks trust by itself, so that a heartbeat stuck in a dead socket does not keep jobs going.
- Each step has a deadline. After it the job is not renewed any more, whether or not its task can be cancelled, so a
  step that hangs for ever costs one lease and not a worker.

    held ──renewed──▶ held ──missing from the answer──▶ lost: cancel the task, write nothing
      │                 └────flagged───────────────────▶ cancelled: cancel the task, give the job back
      ├──trust ran out──────────────────────────────────▶ lost
      └──step deadline──────────────────────────────────▶ timed out: cancel the task, fail the job
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING

import structlog

from upload_pipeline.database.connection import ConnectionOptions, connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    import asyncpg

    from upload_pipeline.database.queue import Lease
    from upload_workers.steps import Lacking

log = structlog.get_logger(__name__)

TRUST_MARGIN = 0.1
"""Share of the lease that a worker leaves unused at its end."""


class StopReason(Enum):
    """Why a job's task was cancelled."""

    LOST = "lost"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"


@dataclass(slots=True)
class HeldLease:
    """A lease as this process sees it; times are of `time.monotonic()`, in seconds."""

    lease: Lease
    trusted_until: float
    step_deadline: float
    task: asyncio.Task[Lacking | None] | None = None
    stopped: StopReason | None = None


@dataclass
class LeaseKeeper:
    """Renews what a worker holds and cancels the tasks of what it has lost.

    Attributes:
        connect: opens the heartbeat's own connection; called again after each failure, on the heartbeat's event loop.
        ttl: how long a claim or a renewal lasts, in seconds.
        interval: seconds between two renewals; one may take as long, or a third of the lease where that is longer.
    """

    worker_id: UUID
    connect: Callable[[], Awaitable[asyncpg.Connection]]
    ttl: float
    interval: float
    step_timeout: float
    _held: dict[UUID, HeldLease] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _thread: threading.Thread | None = None
    _beat_loop: asyncio.AbstractEventLoop | None = None
    _beating: asyncio.Task[None] | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the heartbeat; tasks are cancelled on `loop`."""
        self._loop = loop
        self._beat_loop = asyncio.new_event_loop()
        # A daemon: nothing that it waits for must keep the process from ending.
        self._thread = threading.Thread(target=self._run_beats, args=(self._beat_loop,), name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> None:
        """Ends the heartbeat, a renewal under way too; leaves it behind where that takes over `timeout` seconds."""
        if self._thread is None or self._beat_loop is None:
            return
        if not self._beat_loop.is_closed():
            self._beat_loop.call_soon_threadsafe(self._end_beats)
        self._thread.join(timeout)

    def _end_beats(self) -> None:
        self._stop.set()
        if self._beating is not None:
            self._beating.cancel()

    def hold(self, lease: Lease, *, sent: float) -> HeldLease:
        """Takes care of a lease that was asked for at `sent` (monotonic seconds).

        An older lease on the same job is lost with that: there is but one at a time.
        """
        held = HeldLease(lease, self._trust(sent), time.monotonic() + self.step_timeout)
        with self._lock:
            older = self._held.get(lease.job_id)
            self._held[lease.job_id] = held
        if older is not None:
            self._stop_task(older, StopReason.LOST)
        return held

    def next_step(self, held: HeldLease, *, sent: float) -> None:
        """A transition renewed the lease: trust it anew, and start the next step's clock."""
        with self._lock:
            held.trusted_until = max(held.trusted_until, self._trust(sent))
            held.step_deadline = time.monotonic() + self.step_timeout

    def forget(self, held: HeldLease) -> None:
        """The job has ended here, or is lost."""
        with self._lock:
            if self._held.get(held.lease.job_id) is held:
                del self._held[held.lease.job_id]

    def leases(self) -> list[Lease]:
        """What is held now and not lost."""
        with self._lock:
            return [held.lease for held in self._held.values() if held.stopped is None]

    def check_trust(self) -> None:
        """Stops what is no longer to be trusted; the event loop calls it about once a second."""
        now = time.monotonic()
        with self._lock:
            late = [held for held in self._held.values() if held.stopped is None and now >= held.step_deadline]
            lost = [held for held in self._held.values() if held.stopped is None and now >= held.trusted_until]
        for held in lost:
            self._stop_task(held, StopReason.LOST)
        for held in late:
            self._stop_task(held, StopReason.TIMED_OUT)

    def _trust(self, sent: float) -> float:
        return sent + self.ttl * (1 - TRUST_MARGIN)

    def _stop_task(self, held: HeldLease, reason: StopReason) -> None:
        if held.stopped is None:
            held.stopped = reason
            log.warning("lease_stopped", job_id=str(held.lease.job_id), reason=reason.value)
            if held.task is not None:
                held.task.cancel()

    def _run_beats(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner, suppress(asyncio.CancelledError):
            runner.run(self._beat())

    async def _beat(self) -> None:
        self._beating = asyncio.current_task()
        connection: asyncpg.Connection | None = None
        # The first beat comes at once: connecting takes longest while a step keeps the processor busy.
        wait = 0.0
        try:
            while not await self._stopped_within(wait):
                wait = self.interval
                try:
                    async with asyncio.timeout(max(self.interval, self.ttl / 3)):
                        if connection is None:
                            connection = await self.connect()
                        await self._renew(connection)
                except Exception as error:  # noqa: BLE001 - a heartbeat that ends takes every job of the worker with it
                    # Trust runs out by itself; until then try again, soon.
                    log.warning("heartbeat_failed", error=str(error) or type(error).__name__)
                    if connection is not None:
                        connection.terminate()
                    connection = None
                    wait = min(1.0, self.interval)
        finally:
            if connection is not None:
                connection.terminate()

    async def _stopped_within(self, seconds: float) -> bool:
        """Whether stop() was called; waits for that so long."""
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _renew(self, connection: asyncpg.Connection) -> None:
        now = time.monotonic()
        with self._lock:
            asked = [h for h in self._held.values() if h.stopped is None and now < h.step_deadline]
        rows = await connection.fetch(
            "select job_id, cancel_requested from upload_pipeline.renew_leases($1, $2, $3, $4)",
            self.worker_id,
            [held.lease.job_id for held in asked],
            [held.lease.token for held in asked],
            timedelta(seconds=self.ttl),
        )
        renewed = {row["job_id"]: row["cancel_requested"] for row in rows}
        with self._lock:
            for held in asked:
                if held.lease.job_id in renewed:
                    held.trusted_until = max(held.trusted_until, self._trust(now))
        for held in asked:
            if held.lease.job_id not in renewed:
                # A transition may have ended the job since the list was made; then nobody holds it here any more.
                with self._lock:
                    current = self._held.get(held.lease.job_id) is held
                if current:
                    self._call_soon(held, StopReason.LOST)
            elif renewed[held.lease.job_id]:
                self._call_soon(held, StopReason.CANCELLED)

    def _call_soon(self, held: HeldLease, reason: StopReason) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop_task, held, reason)


async def heartbeat_connection(url: str, options: ConnectionOptions, interval: float) -> asyncpg.Connection:
    """A connection for the heartbeat alone, on which no statement takes longer than `interval` seconds."""
    bounds = replace(
        options,
        application_name="upload-pipeline heartbeat",
        connect_timeout=min(options.connect_timeout, interval),
        statement_timeout=min(options.statement_timeout or interval, interval),
    )
    return await connect(url, bounds)
