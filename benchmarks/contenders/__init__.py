"""One module a queue: `setup(url)`, `enqueue(url, n)` and `drain(url, n) -> seconds`, each run in a process of its own.

`drain` times from the first claim to the moment at which the database says that nothing is unfinished, with one worker
process and a step that does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg


async def until_drained(connection: asyncpg.Connection, unfinished: str, *, pause: float = 0.01) -> None:
    """Waits until `unfinished`, a query for one boolean, says false; asks again every `pause` seconds."""
    while await connection.fetchval(unfinished):
        await asyncio.sleep(pause)


class Counter:
    """Counts what a step has handled, and says when all of it is."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.count = 0
        self.all_handled = asyncio.Event()

    def hit(self) -> None:
        """One more."""
        self.count += 1
        if self.count >= self.expected:
            self.all_handled.set()


Stop = Callable[[], None]
