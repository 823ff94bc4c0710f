"""A clock that many tasks and their database connections share, and that moves when all of them sleep."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Coroutine, Iterable
from datetime import timedelta
from typing import Any

import asyncpg
from verbs import EPOCH


class VirtualTime:
    """Seconds since `verbs.EPOCH`, on a grid, so that many tasks wake at the same moment and meet in the database."""

    def __init__(self, grid: float = 0.25) -> None:
        self.now = 0.0
        self._grid = grid
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._order = itertools.count()
        self._awake = 0
        self._all_asleep = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        """Until so much later, rounded up to the grid."""
        ticks = -(-(self.now + seconds) // self._grid)
        event = asyncio.Event()
        heapq.heappush(self._sleepers, (ticks * self._grid, next(self._order), event))
        self._rest()
        await event.wait()

    async def run(self, tasks: Iterable[Coroutine[Any, Any, None]], until: float) -> None:
        """Runs tasks that never end until the moment comes; what they raise is raised."""
        started = [asyncio.create_task(self._task(task)) for task in tasks]
        self._awake = len(started)
        try:
            while True:
                await self._all_asleep.wait()
                self._all_asleep.clear()
                for task in started:
                    if task.done():
                        task.result()
                if not self._sleepers or self._sleepers[0][0] > until:
                    return
                self.now = self._sleepers[0][0]
                while self._sleepers and self._sleepers[0][0] <= self.now:
                    self._awake += 1
                    heapq.heappop(self._sleepers)[2].set()
        finally:
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)

    async def _task(self, task: Coroutine[Any, Any, None]) -> None:
        try:
            await task
        finally:
            self._rest()

    def _rest(self) -> None:
        self._awake -= 1
        if self._awake == 0:
            self._all_asleep.set()


class ClockedConnection:
    """A connection whose verbs read the shared clock."""

    def __init__(self, connection: asyncpg.Connection, time: VirtualTime) -> None:
        self._connection = connection
        self._time = time
        self._set = -1.0

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        await self._set_clock()
        return list(await self._connection.fetch(query, *args))

    async def fetchrow(self, query: str, *args: Any) -> Any:
        await self._set_clock()
        return await self._connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        await self._set_clock()
        return await self._connection.fetchval(query, *args)

    async def _set_clock(self) -> None:
        if self._set != self._time.now:
            self._set = self._time.now
            moment = EPOCH + timedelta(seconds=self._set)
            await self._connection.execute(f"set upload_pipeline.now = '{moment.isoformat()}'")
