"""Hearing notifications of one channel, on a connection that proves that it still hears.

A notification can be lost without anybody noticing (a pooler in between, a half-open socket), so the listener proves
itself: it notifies itself through its own connection and waits for that to arrive. One that fails the proof is
rebuilt. Whoever uses it must have another way for the time in between, and look once whenever it has proved itself.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import asyncpg

log = structlog.get_logger(__name__)

PROBE_INTERVAL = 30.0
PROBE_TIMEOUT = 5.0
REBUILD_DELAYS = (1.0, 30.0)
"""Seconds before a listener that failed is rebuilt: the first wait, and the longest after doubling."""

_PROBE = "probe:"


@dataclass
class Listener:
    """Tells what is notified on a channel, as far as notifications arrive.

    Attributes:
        connect: opens a session connection of the listener's own.
        heard: called with each payload.
        proved: called when a connection has proved itself: from now on nothing is missed.
        lost: called when a connection that had proved itself is given up.
        probe_interval: seconds between two proofs.
        probe_timeout: seconds that a proof may take.
        healthy: whether the last proof succeeded.
    """

    connect: Callable[[], Awaitable[asyncpg.Connection]]
    channel: str
    heard: Callable[[str], None]
    proved: Callable[[], None] = lambda: None
    lost: Callable[[], None] = lambda: None
    probe_interval: float = PROBE_INTERVAL
    probe_timeout: float = PROBE_TIMEOUT
    healthy: bool = False
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

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
                log.warning(
                    "listener_failed", channel=self.channel, error=str(error) or type(error).__name__, retry_in=delay
                )
            if self.healthy:
                self.healthy = False
                self.lost()
            await asyncio.sleep(delay)
            delay *= 2

    async def _listen(self) -> None:
        connection = await self.connect()
        probe = f"{_PROBE}{uuid4()}"

        def notified(_connection: Any, _pid: int, _channel: str, payload: str) -> None:
            if payload == probe:
                self._arrived.set()
            elif not payload.startswith(_PROBE):
                self.heard(payload)

        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _connection: ended.set())
            await connection.add_listener(self.channel, notified)
            while True:
                self._arrived.clear()
                await connection.execute("select pg_notify($1, $2)", self.channel, probe, timeout=self.probe_timeout)
                # Not `wait_for`: before Python 3.12 it forgets a cancellation that comes together with the event.
                async with asyncio.timeout(self.probe_timeout):
                    await self._arrived.wait()
                if not self.healthy:
                    self.healthy = True
                    self.proved()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.probe_interval):
                        await ended.wait()
        finally:
            connection.terminate()
