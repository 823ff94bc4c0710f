"""A worker's watch on its own memory: above a limit it claims nothing, and what it has begun goes on.

Jobs that nobody claims wait for a worker with room; a worker that the kernel kills takes an attempt of every job it
holds with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import structlog

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks: a parse or an embedding takes some hundred milliseconds to grow."""


def used_bytes() -> int:
    """Resident memory of this process and of all it has started; pages that they share count for each."""
    own = psutil.Process()
    used: int = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            used += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return used


@dataclass
class MemoryWatch:
    """Whether more than `limit` bytes are used; `over` says what the last look found.

    Attributes:
        limit: bytes.
        freed: called when there is room again.
        used: how much is used, in bytes; blocks, so it is asked in a thread.
    """

    limit: int
    freed: Callable[[], None]
    used: Callable[[], int] = used_bytes
    over: bool = field(default=False, init=False)

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """One look; a line in the log and a call of `freed` where the answer has changed."""
        used = await asyncio.to_thread(self.used)
        if used > self.limit and not self.over:
            self.over = True
            log.warning("memory_limit_reached", used_bytes=used, limit_bytes=self.limit)
        elif used <= self.limit and self.over:
            self.over = False
            log.info("memory_freed", used_bytes=used, limit_bytes=self.limit)
            self.freed()
