"""Waking up: a worker waits for a notification, for a slot of its own to come free, or for its next look.

Polling alone suffices; LISTEN only makes it prompt. While a listener is rebuilt, polling carries on by itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upload_pipeline.database.listening import Listener
from upload_pipeline.database.queue import WAKE_CHANNEL

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Collection

    import asyncpg


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


def wake_listener(
    connect: Callable[[], Awaitable[asyncpg.Connection]], pools: Collection[str], wake: asyncio.Event
) -> Listener:
    """A listener that sets `wake` whenever one of `pools` has got work, as far as notifications arrive."""

    def heard(pool: str) -> None:
        if pool in pools:
            wake.set()

    # What was notified before the listener stood is found by looking once.
    return Listener(connect, WAKE_CHANNEL, heard, proved=wake.set)
