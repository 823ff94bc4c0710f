"""Waking up: a worker waits for a notification, for a slot of its own to come free, or for its next look.

Polling alone suffices; LISTEN only makes it prompt. A notification can be lost without anybody noticing (a pooler in
between, a half-open socket), so the listener proves itself: it notifies itself through its own connection and waits
for that to arrive. A listener that fails the proof is rebuilt, and until then polling carries on by itself.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog

from upload_pipeline.database.queue import WAKE_CHANNEL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    import asyncpg

log = structlog.get_logger(__name__)

PROBE_INTERVAL = 30.0
PROBE_TIMEOUT = 5.0
REBUILD_DELAYS = (1.0, 30.0)
"""Seconds before a listener that failed is rebuilt: the first wait, and the longest after doubling."""


@dataclass
class AdaptivePoll:
    """How long to wait before looking again: doubles from `shortest` to `longest` while there is nothing to do.

    Attributes:
        jitter: draws from [0, 1); the wait is spread by a fifth to either side, so that workers do not march in step.
    """

    shortest: float
    longest: float
    jitter: Callable[[], float] = random.random
    _wait: float = 0.0

    def found_work(self) -> None:
        """Starts again from the shortest wait."""
        self._wait = 0.0

    def next_wait(self) -> float:
        """Seconds until the next look: shortest, twice that, ... longest, each x 0.8 to 1.2."""
        self._wait = min(max(self.shortest, self._wait * 2), self.longest)
        return self._wait * (0.8 + 0.4 * self.jitter())


@dataclass
class WakeListener:
    """Sets `wake` whenever one of `pools` has got work, as far as notifications arrive.

    Attributes:
        connect: opens a session connection of the listener's own.
        probe_interval: seconds between two proofs.
        probe_timeout: seconds that a proof may take.
        healthy: whether the last proof succeeded.
    """

    connect: Callable[[], Awaitable[asyncpg.Connection]]
    pools: Collection[str]
    wake: asyncio.Event
    probe_interval: float = PROBE_INTERVAL
    probe_timeout: float = PROBE_TIMEOUT
    healthy: bool = False
    _proved: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Listens until cancelled; rebuilds the connection whenever it fails or does not prove itself."""
        shortest, longest = REBUILD_DELAYS
        delay = shortest
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - whatever ends a listener, the next one is built
                # One that had proved itself failed for a new reason, and starts from the shortest wait again.
                delay = shortest if self.healthy else min(delay, longest)
                log.warning("listener_failed", error=str(error) or type(error).__name__, retry_in=delay)
            self.healthy = False
            await asyncio.sleep(delay)
            delay *= 2

    async def _listen(self) -> None:
        connection = await self.connect()
        probe = f"probe:{uuid4()}"

        def notified(_connection: Any, _pid: int, _channel: str, payload: str) -> None:
            if payload == probe:
                self._proved.set()
            elif payload in self.pools:
                self.wake.set()

        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _connection: ended.set())
            await connection.add_listener(WAKE_CHANNEL, notified)
            while True:
                self._proved.clear()
                await connection.execute("select pg_notify($1, $2)", WAKE_CHANNEL, probe, timeout=self.probe_timeout)
                await asyncio.wait_for(self._proved.wait(), self.probe_timeout)
                if not self.healthy:
                    # What was notified before this listener stood is found by looking once.
                    self.wake.set()
                self.healthy = True
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), self.probe_interval)
        finally:
            connection.terminate()
