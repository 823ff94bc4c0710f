"""A worker above its memory limit claims nothing; what it has begun goes on, and room makes it claim again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable

from probe_world import ProbeWorld, steps_of, until_true

from upload_pipeline.database.queue import ClaimedJob
from upload_workers.memory import MemoryWatch, used_bytes
from upload_workers.steps import Advance, Outcome, StepContext

MIB = 1024 * 1024
CHILD = "import sys; held = b'x' * (64 << 20); print(len(held), flush=True); sys.stdin.read()"


async def test_above_the_limit_nothing_is_claimed_and_what_is_at_work_ends(world: ProbeWorld) -> None:
    held: list[bytes] = []
    seen: list[int] = []

    async def grow(job: ClaimedJob, context: StepContext) -> Outcome:
        """The first job grows and ends a good while after the limit was passed; the others find its memory free."""
        seen.append(used_bytes())
        if len(seen) == 1:
            held.append(b"x" * (160 * MIB))
            await asyncio.sleep(1.5)
        return Advance()

    limit = used_bytes() + 96 * MIB
    await world.enqueue(3)
    async with world.worker(steps_of(grow), concurrency=1, worker_memory_bytes=limit) as runner:
        await until_true(lambda: runner.ended == 1, "the job that grew to end")
        await asyncio.sleep(0.5)
        assert (runner.claimed, len(seen)) == (1, 1)
        held.clear()
        await world.until_all("done")
    assert all(used <= limit for used in seen)


async def test_a_worker_that_starts_above_its_limit_claims_nothing(world: ProbeWorld) -> None:
    await world.enqueue(1)
    async with world.worker(steps_of(), worker_memory_bytes=1) as runner:
        await asyncio.sleep(0.3)
        assert runner.claimed == 0
    assert await world.admin.fetchval("select state from upload_pipeline.upload_jobs") == "queued"


def test_what_a_child_uses_counts() -> None:
    before = used_bytes()
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline()
        assert used_bytes() - before > 60 * MIB
    finally:
        child.communicate("")


async def test_the_watch_tells_of_changes_only() -> None:
    freed: list[str] = []
    uses = iter([10, 11, 12, 10, 9])
    used: Callable[[], int] = lambda: next(uses)  # noqa: E731
    watch = MemoryWatch(10, freed=lambda: freed.append("freed"), used=used)
    found = []
    for _ in range(5):
        await watch.look()
        found.append(watch.over)
    assert found == [False, True, True, False, False]
    assert freed == ["freed"]
