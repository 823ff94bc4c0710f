"""Waiting for something only so long, also where it does not let itself be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def bounded(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """What `work` returns. Unlike `asyncio.wait_for`, this does not wait for the end of a work that it cancels.

    A statement over a dead socket, for one, ends its cancellation only when the server has said so.

    Raises:
        TimeoutError: it took longer; it is cancelled and left behind.
    """
    task = asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.add_done_callback(_forget)
            task.cancel()
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return task.result()


def _forget(task: asyncio.Task[Any]) -> None:
    """Takes note of the error of a task that nobody waits for, as asyncio complains of those that nobody saw."""
    if not task.cancelled():
        task.exception()
