"""Each way in which a step can end, with the row that it leaves."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from probe_world import ProbeWorld, advance, steps_of, until_true

from upload_pipeline.database import queue
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_workers.steps import Advance, Commit, Outcome, Snooze, Step, StepContext


def raising(error: BaseException) -> Step:
    async def step(job: ClaimedJob, context: StepContext) -> Outcome:
        raise error

    return step


async def test_advance_leads_to_the_end_and_keeps_the_results(world: ProbeWorld) -> None:
    async def with_results(job: ClaimedJob, context: StepContext) -> Outcome:
        return Advance({"pages": 3})

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(second=with_results)):
        job = await world.until_state(job_id, "done")
    assert (job["stage"], json.loads(job["results"]), job["retry_count"]) == ("end", {"pages": 3}, 0)
    # one claim: the lease was kept between the steps
    assert await world.events(job_id) == ["job_enqueued", "job_claimed", "job_advanced", "job_done"]


async def test_each_step_sees_the_stage_that_it_leaves(world: ProbeWorld) -> None:
    seen = []

    async def look(job: ClaimedJob, context: StepContext) -> Outcome:
        seen.append(job.stage)
        return Advance()

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(look, look)):
        await world.until_state(job_id, "done")
    assert seen == ["first", "second"]


async def test_commit_is_called_with_the_lease(world: ProbeWorld) -> None:
    calls = []

    async def verb(db: Any, lease: queue.Lease, *, keep: bool, ttl: timedelta) -> queue.Transition:
        calls.append((keep, ttl))
        stage = ("first", "second", "end")[len(calls) - 1 : len(calls) + 1]
        moved = await queue.advance_jobs(db, [queue.Advance(lease, *stage, keep)], ttl=ttl)
        return moved[lease.job_id]

    async def commit(job: ClaimedJob, context: StepContext) -> Outcome:
        return Commit(verb)

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(commit, commit)):
        await world.until_state(job_id, "done")
    assert calls == [(True, timedelta(seconds=2))] * 2


async def test_snooze_gives_the_job_back_and_counts_no_retry(world: ProbeWorld) -> None:
    async def later(job: ClaimedJob, context: StepContext) -> Outcome:
        return Snooze(timedelta(hours=1))

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(later)):
        job = await world.until_state(job_id, "retryable")
    assert (job["stage"], job["retry_count"], job["lease_expires_at"]) == ("first", 0, None)


async def test_snoozed_job_is_taken_up_again(world: ProbeWorld) -> None:
    looks = []

    async def second_time(job: ClaimedJob, context: StepContext) -> Outcome:
        looks.append(job.retry_count)
        return Advance() if len(looks) > 1 else Snooze(timedelta(seconds=0.05))

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(second_time)):
        await world.until_state(job_id, "done")
    assert looks == [0, 0]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (PipelineError(ErrorCode.PARSE_TIMEOUT, "too slow"), "retryable", "PARSE_TIMEOUT"),
        (PipelineError(ErrorCode.ENCRYPTED, "locked"), "deadletter", "ENCRYPTED"),
        (ValueError("boom"), "retryable", "INTERNAL"),
        (MemoryError(), "retryable", "INTERNAL"),
        (SystemExit(3), "retryable", "INTERNAL"),
        (GeneratorExit(), "retryable", "INTERNAL"),
        (BaseExceptionGroup("two", [ValueError("a"), SystemExit(1)]), "retryable", "INTERNAL"),
        (asyncio.CancelledError(), "retryable", "INTERNAL"),
        (asyncpg.InterfaceError("connection is closed"), "retryable", "DATABASE_UNAVAILABLE"),
        (ConnectionResetError("reset"), "retryable", "DATABASE_UNAVAILABLE"),
        (asyncpg.DeadlockDetectedError("deadlock"), "retryable", "DATABASE_UNAVAILABLE"),
        (asyncpg.UndefinedTableError("no table"), "retryable", "INTERNAL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
async def test_what_a_step_raises_fails_its_own_job_and_no_other(
    world: ProbeWorld, error: BaseException, state: str, code: str
) -> None:
    (bad,) = await world.enqueue()

    async def first(job: ClaimedJob, context: StepContext) -> Outcome:
        return await (raising(error) if job.job_id == bad else advance)(job, context)

    async with world.worker(steps_of(first)):
        job = await world.until_state(bad, "retryable", "deadletter")
        (good,) = await world.enqueue()
        await world.until_state(good, "done")
    assert (job["state"], job["error_code"], job["stage"]) == (state, code, "first")
    assert job["retry_count"] == (1 if state == "retryable" else 0)


@pytest.mark.parametrize("text", ["nul \0 in it", "surrogate \udc80 in it"])
async def test_failure_with_what_postgres_cannot_hold_is_recorded_all_the_same(world: ProbeWorld, text: str) -> None:
    details = {"name": text, text: [text], "path": Path("/x"), "nan": float("nan"), "ids": {1}}
    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(raising(PipelineError(ErrorCode.PARSE_FAILED, text, details)))):
        job = await world.until_state(job_id, "deadletter")
    assert job["error_code"] == "PARSE_FAILED"
    assert job["error_message"].endswith("in it")
    kept = json.loads(job["error_details"])
    assert (kept["path"], kept["nan"], kept["ids"]) == ("/x", "nan", [1])


async def test_step_that_returns_no_outcome_fails_at_once(world: ProbeWorld) -> None:
    async def nothing(job: ClaimedJob, context: StepContext) -> Any:
        return None

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(nothing)):
        job = await world.until_state(job_id, "retryable")
    assert job["error_code"] == "INTERNAL"
    assert "no outcome" in job["error_message"]


async def test_results_that_are_no_json_fail_their_own_job_and_no_neighbour(world: ProbeWorld) -> None:
    for bad in ({"x": object()}, {"x": "\0"}, {"x": float("nan")}):
        jobs = await world.enqueue(4)

        async def first(
            job: ClaimedJob, context: StepContext, bad: dict[str, Any] = bad, culprit: Any = jobs[0]
        ) -> Outcome:
            return Advance(bad if job.job_id == culprit else None)

        async with world.worker(steps_of(first), group_window=0.1):
            job = await world.until_state(jobs[0], "retryable")
            for neighbour in jobs[1:]:
                await world.until_state(neighbour, "done")
        assert job["error_code"] == "INTERNAL"
        assert [(await world.job(neighbour))["retry_count"] for neighbour in jobs[1:]] == [0, 0, 0]
        await world.admin.execute("select * from upload_pipeline.cancel_job($1)", jobs[0])


async def test_stage_that_the_worker_does_not_know_is_left_for_others(world: ProbeWorld) -> None:
    (job_id,) = await world.enqueue()
    steps = {key: step for key, step in steps_of().items() if key[1] == "first"}
    async with world.worker(steps):
        job = await world.until_state(job_id, "retryable")
    assert (job["stage"], job["retry_count"], job["error_code"]) == ("second", 0, None)
    left = await world.admin.fetchval("select run_at > now() + '20 seconds' from upload_pipeline.upload_jobs")
    assert left


async def test_cancel_of_a_job_at_work_stops_its_step_within_a_beat(world: ProbeWorld) -> None:
    entered, ended = asyncio.Event(), []

    async def wait(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return Advance()

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(wait)) as runner:
        await entered.wait()
        await world.admin.execute("select * from upload_pipeline.cancel_job($1)", job_id)
        job = await world.until_state(job_id, "cancelled")
        await until_true(lambda: runner.at_work == 0, "the slot to come free")
    assert ended == ["cancelled"]
    assert (job["retry_count"], job["error_code"]) == (0, None)


async def test_cancel_of_a_job_whose_step_ignores_it_ends_it_when_the_step_ends(world: ProbeWorld) -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def deaf(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.set()
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        return Advance()

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(deaf), lease_ttl=30.0) as runner:
        await entered.wait()
        await world.admin.execute("select * from upload_pipeline.cancel_job($1)", job_id)
        await until_true(lambda: not runner.keeper.leases(), "the cancel to be heard")
        go.set()
        job = await world.until_state(job_id, "cancelled")
    assert job["stage"] == "first"


async def test_each_failure_counts_and_the_fourth_is_the_last(world: ProbeWorld) -> None:
    await world.retry_soon()
    tries = []

    async def fail(job: ClaimedJob, context: StepContext) -> Outcome:
        tries.append(job.retry_count)
        raise RuntimeError("again")

    (job_id,) = await world.enqueue()
    async with world.worker(steps_of(fail)):
        job = await world.until_state(job_id, "deadletter")
    assert tries == [0, 1, 2, 3]
    assert job["error_code"] == "INTERNAL"
