"""A worker that lacks what jobs need leaves their pool to others, and comes back."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from probe_world import ProbeWorld, advance, steps_of, until, until_true

from upload_pipeline.database.queue import ClaimedJob
from upload_workers import runner as runner_module
from upload_workers.steps import Advance, Outcome, Snooze, StepContext


class Keyless:
    """A step that needs what this worker lacks."""

    def __init__(self) -> None:
        self.lacks = True
        self.asked: list[UUID] = []

    async def __call__(self, job: ClaimedJob, context: StepContext) -> Outcome:
        self.asked.append(job.job_id)
        return Snooze(timedelta(seconds=0), self.still_lacks) if self.lacks else Advance()

    async def still_lacks(self) -> bool:
        return self.lacks


async def until_told(world: ProbeWorld, *left: list[str]) -> None:
    """Returns once the register says of the workers, the oldest first, that they leave these pools."""

    async def told() -> bool:
        rows = await world.admin.fetch("select left_pools from upload_pipeline.workers order by started_at")
        return [row["left_pools"] for row in rows] == list(left)

    await until(told, f"the register to tell of {left}")


async def until_all_ready(world: ProbeWorld, stage: str, count: int) -> None:
    """Returns once so many jobs are queued at a stage, and nothing is at work or put off."""

    async def there() -> bool:
        states = await world.admin.fetch("select state::text, stage from upload_pipeline.upload_jobs")
        return [tuple(row) for row in states] == [("queued", stage)] * count

    await until(there, f"{count} jobs ready at {stage}")


async def test_a_job_is_claimed_once_by_a_worker_that_cannot_serve_it_and_done_by_one_that_can(
    world: ProbeWorld,
) -> None:
    keyless = Keyless()
    await world.enqueue(3)
    async with world.worker(steps_of(keyless), concurrency=1) as unable:
        await until_true(lambda: unable.left_pools == ["default"], "the pool to be left")
        await until_all_ready(world, "first", 3)
        await until_told(world, ["default"])
        async with world.worker(steps_of(advance)) as able:
            await world.until_all("done")
            assert able.left_pools == []
            await until_told(world, ["default"], [])
            assert able.claimed == 3
        assert unable.claimed == len(keyless.asked) == 1
    assert await world.admin.fetchval("select sum(retry_count) from upload_pipeline.upload_jobs") == 0


async def test_it_comes_back_when_it_lacks_nothing_any_more(world: ProbeWorld) -> None:
    keyless = Keyless()
    await world.enqueue(3)
    async with world.worker(steps_of(keyless), concurrency=1) as worker:
        await until_true(lambda: worker.left_pools, "the pool to be left")
        keyless.lacks = False
        await world.until_all("done")
        assert worker.left_pools == []
        await until_told(world, [])
    assert len(keyless.asked) == 4
    events = await world.admin.fetch(
        "select severity::text from upload_pipeline.events where code = 'worker_left_pools' order by event_id"
    )
    assert [row["severity"] for row in events] == ["error", "info"]


async def test_it_looks_again_after_a_while(world: ProbeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "LEAVE_SECONDS", 0.1)
    keyless = Keyless()
    await world.enqueue()
    async with world.worker(steps_of(keyless)):
        await until_true(lambda: len(keyless.asked) >= 3, "the job to be claimed again")


async def test_its_other_pools_are_served_all_the_while(world: ProbeWorld) -> None:
    await world.admin.execute(
        "update upload_pipeline.stages set pool = 'embed' where pipeline = 'probe' and stage = 'second'"
    )
    keyless = Keyless()
    await world.enqueue()
    async with world.worker(steps_of(advance, keyless), pools=("default", "embed")) as worker:
        await until_true(lambda: worker.left_pools == ["embed"], "the pool to be left")
        await world.enqueue(2)
        await until_all_ready(world, "second", 3)
    assert len(keyless.asked) == 1
