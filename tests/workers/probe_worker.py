"""A worker process for the tests: `python probe_worker.py STEP`, told the rest by its settings.

Writes one line to standard output as each step begins: the job's id and its lease token.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import uvloop
from probe_world import steps_of

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.logs import configure_logs
from upload_pipeline.settings import load_settings
from upload_workers.process import work_until_stopped
from upload_workers.steps import Advance, Outcome, Step, StepContext


async def quick() -> None:
    """Nothing."""


async def nap() -> None:
    """Half a second."""
    await asyncio.sleep(0.5)


async def wait() -> None:
    """For ever, but can be cancelled."""
    await asyncio.Event().wait()


async def deaf() -> None:
    """For ever, and cannot be cancelled."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


async def spin() -> None:
    """Blocks the event loop for ever."""
    while True:
        sum(range(1000))


async def thread() -> None:
    """Computes in a thread for ever."""
    await asyncio.to_thread(time.sleep, 3600)


WORKS: dict[str, Callable[[], Awaitable[None]]] = {
    work.__name__: work for work in (quick, nap, wait, deaf, spin, thread)
}


def step_that(work: Callable[[], Awaitable[None]]) -> Step:
    """A step that says that it begins, and does this."""

    async def step(job: ClaimedJob, context: StepContext) -> Outcome:
        print(job.job_id, job.lease.token, flush=True)
        await work()
        return Advance()

    return step


def main() -> None:
    settings = load_settings()
    configure_logs(settings)
    step = step_that(WORKS[sys.argv[1]])
    uvloop.run(work_until_stopped(settings, settings.database_url.get_secret_value(), steps=steps_of(step)))


if __name__ == "__main__":
    main()
