"""The worker that a command brings along where nobody else would do its work."""

from __future__ import annotations

import os
import socket
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from upload_pipeline.database.listings import live_workers

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor
    from upload_pipeline.settings import Settings
    from upload_pipeline.storage.store import ObjectStore

LOOK_SECONDS = 5.0
"""Longest time between two looks whether the others are still there."""


class WorkerBeside:
    """Sees to it that somebody works: another process, or else a worker within this one."""

    def __init__(self, settings: Settings, url: str, store: ObjectStore, db: Executor) -> None:
        self._settings = settings
        self._url = url
        self._store = store
        self._db = db
        self._stack: AsyncExitStack | None = None
        self._next_look = 0.0

    async def ensure(self) -> None:
        """Starts the worker of this process where no other serves every pool. Looks again now and then."""
        if self._stack is not None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + min(LOOK_SECONDS, self._settings.lease_ttl / 4)
        workers, pools = await live_workers(self._db, silence=timedelta(seconds=self._settings.lease_ttl))
        served = {pool for worker in workers if _is_alive(worker.host, worker.pid) for pool in worker.pools}
        if pools <= served:
            return
        from upload_workers.process import running_worker

        stack = AsyncExitStack()
        await stack.enter_async_context(
            running_worker(self._settings, self._url, pools=sorted(pools), store=self._store)
        )
        self._stack = stack

    async def stop(self) -> None:
        """Drains the worker: running steps finish, the rest is handed back."""
        if self._stack is not None:
            await self._stack.aclose()
            self._stack = None


def _is_alive(host: str, pid: int) -> bool:
    """False only where it is known: a process of this host that is gone, but was heard of within the last lease."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
