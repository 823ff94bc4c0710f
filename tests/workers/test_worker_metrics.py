"""What a worker tells Prometheus, and that a write which comes too late is seen by an operator."""

from __future__ import annotations

import asyncio
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from probe_world import ProbeWorld, advance, steps_of, until, until_true
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from upload_pipeline.api.metrics import ServiceMetrics
from upload_pipeline.database import queue
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import MARKDOWN
from upload_pipeline.providers.calls import ProviderCalls
from upload_workers.metrics import WorkerMetrics
from upload_workers.runner import Runner
from upload_workers.steps import Advance, Commit, Outcome, Snooze, StepContext

GUIDE = Path(__file__).parents[2] / "docs" / "operations.md"


def told(registry: CollectorRegistry) -> dict[str, float]:
    """The samples without a bucket's, each as `name{label=value,…}` without the common prefix."""
    return {
        sample.name.removeprefix("upload_pipeline_")
        + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


async def take_away(world: ProbeWorld, job: ClaimedJob) -> None:
    """The job waits for another pool from now on."""
    await world.admin.execute("update upload_pipeline.stages set pool = 'nobodys' where pipeline = 'probe'")
    await world.admin.execute("select * from upload_pipeline.retry_job($1, null, true)", job.job_id)


async def until_idle(world: ProbeWorld, runner: Runner) -> None:
    await until_true(lambda: runner.at_work == 0 and runner.ended > 0, "the end of the job")


async def test_claims_steps_and_calls_are_counted_and_told_over_http(world: ProbeWorld, tmp_path: Path) -> None:
    path = tmp_path / "two.md"
    path.write_text("# Two\n\nwords\n")

    async def use_providers(job: ClaimedJob, context: StepContext) -> Outcome:
        await context.parser.inspect(path, MARKDOWN)
        await context.parser.parse(path, MARKDOWN)
        await (await context.models.active()).embedder.embed(["one", "two"])
        return Advance()

    async def fail(job: ClaimedJob, context: StepContext) -> Outcome:
        with pytest.raises(PipelineError):
            await context.parser.parse(tmp_path / "missing", MARKDOWN)
        raise PipelineError(ErrorCode.PARSE_EMPTY, "nothing in it")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with world.worker(steps_of(use_providers, fail), health_port=port) as runner:
        (job,) = await world.enqueue()
        await world.until_state(job, "deadletter")
        await until_idle(world, runner)
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            families = {family.name for family in text_string_to_metric_families(await answer.text())}
        counts = told(runner.metrics.registry)
    assert counts["worker_claims_total outcome=jobs pool=default"] == 1
    assert counts["worker_claimed_jobs_total pool=default"] == 1
    assert counts["worker_steps_total outcome=advance pipeline=probe stage=first"] == 1
    assert counts["worker_steps_total outcome=PARSE_EMPTY pipeline=probe stage=second"] == 1
    assert counts["worker_step_seconds_count pipeline=probe stage=first"] == 1
    assert counts["worker_held_jobs"] == 0
    assert counts["worker_left_pools"] == 0
    assert counts["worker_fenced_writes_total"] == 0
    assert counts["provider_calls_total operation=parse outcome=ok provider=local"] == 1
    assert counts["provider_calls_total operation=inspect outcome=ok provider=local"] == 1
    assert counts["provider_calls_total operation=embed outcome=ok provider=local"] == 1
    assert counts["provider_seconds_count operation=parse provider=local"] == 2
    assert counts["provider_units_total operation=parse provider=local unit=documents"] == 1
    assert counts["provider_units_total operation=embed provider=local unit=texts"] == 2
    refused = [name for name in counts if name.startswith("provider_calls_total operation=parse") and "ok" not in name]
    assert len(refused) == 1
    assert {"upload_pipeline_worker_steps", "upload_pipeline_provider_calls"} <= families


@pytest.mark.parametrize("found_by", ["advance", "commit", "snooze", "failure"])
async def test_a_write_that_comes_too_late_is_counted_and_told_once(world: ProbeWorld, found_by: str) -> None:
    enqueued = asyncio.Event()

    async def late(job: ClaimedJob, context: StepContext) -> Outcome:
        await enqueued.wait()
        await take_away(world, job)

        async def verb(db: Any, lease: queue.Lease, *, keep: bool, ttl: timedelta) -> queue.Transition:
            return queue.Transition(
                **await db.fetchrow(
                    "select job_id, stage, state from upload_pipeline.advance_job($1, $2, 'first', 'second')",
                    lease.job_id,
                    lease.token,
                )
            )

        match found_by:
            case "advance":
                return Advance()
            case "commit":
                return Commit(verb)
            case "snooze":
                return Snooze(timedelta(seconds=1))
        raise PipelineError(ErrorCode.PARSE_FAILED, "it broke")

    # one beat, before the job: no other tells the worker what it is to find out by its write
    async with world.worker(steps_of(late), lease_ttl=120.0, heartbeat_interval=60.0) as runner:

        async def beaten() -> bool:
            return bool(await world.admin.fetchval("select last_beat_at > started_at from upload_pipeline.workers"))

        await until(beaten, "the first beat")
        (job,) = await world.enqueue()
        enqueued.set()
        await until_idle(world, runner)
        assert told(runner.metrics.registry)["worker_fenced_writes_total"] == 1
    row = await world.admin.fetchrow(
        "select * from upload_pipeline.events where job_id = $1 and code = 'write_fenced'", job
    )
    assert (row["severity"], row["worker_id"], row["lease_token"]) == ("warning", runner.worker_id, 1)
    assert (row["user_id"], row["payload"]) == ((await world.job(job))["user_id"], '{"current_token": 2}')
    assert (await world.job(job))["state"] == "queued"
    assert (await world.events(job))[-2:] == ["job_restarted", "write_fenced"]


async def test_a_refused_write_that_cannot_be_recorded_costs_nothing_else(world: ProbeWorld) -> None:
    async def late(job: ClaimedJob, context: StepContext) -> Outcome:
        if job.job_id == taken:
            await take_away(world, job)
        return Advance()

    await world.admin.execute("revoke execute on function upload_pipeline.record_fenced_write from upload_worker")
    (taken,) = await world.enqueue()
    async with world.worker(steps_of(late), lease_ttl=120.0, heartbeat_interval=60.0) as runner:
        await until_idle(world, runner)
        await world.admin.execute("update upload_pipeline.stages set pool = 'default' where pipeline = 'probe'")
        (other,) = await world.enqueue()
        await world.until_state(other, "done")
    assert await world.events(taken) == ["job_enqueued", "job_claimed", "job_restarted"]


async def test_the_record_of_a_refused_write_waits_for_the_jobs_row(world: ProbeWorld, database: Any) -> None:
    """Its event must not become visible after a later one: a stream would go past it."""
    (job,) = await world.enqueue()
    other = await asyncpg.connect(database.worker_url)
    try:
        async with world.admin.transaction():
            await world.admin.execute("select * from upload_pipeline.cancel_job($1)", job)
            lease = queue.Lease(job, 1)
            recording = asyncio.create_task(queue.record_fenced_write(other, lease, worker_id=job))
            await asyncio.sleep(0.2)
            assert not recording.done()
        await recording
        assert await world.events(job) == ["job_enqueued", "job_cancelled", "write_fenced"]
        # a job that is gone is no error
        await world.admin.execute("delete from upload_pipeline.documents")
        await queue.record_fenced_write(other, lease, worker_id=job)
    finally:
        await other.close()


async def test_each_way_in_which_a_step_ends_has_its_outcome(world: ProbeWorld) -> None:
    entered = asyncio.Event()

    async def hang(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.set()
        await asyncio.sleep(60)
        return Advance()

    async def crash(job: ClaimedJob, context: StepContext) -> Outcome:
        raise ValueError("boom")

    outcomes: dict[str, float] = {}

    async def run(step: Any, act: Any, **settings: Any) -> None:
        entered.clear()
        (job,) = await world.enqueue()
        async with world.worker(steps_of(step), **settings) as runner:
            await act(job, runner)
        outcomes.update(
            {name.split()[1]: count for name, count in told(runner.metrics.registry).items() if "steps_total" in name}
        )
        await world.admin.execute("select * from upload_pipeline.cancel_job($1)", job)

    async def cancel(job: Any, runner: Runner) -> None:
        await entered.wait()
        await world.admin.execute("select * from upload_pipeline.cancel_job($1)", job)
        await world.until_state(job, "cancelled")

    async def restart(job: Any, runner: Runner) -> None:
        await entered.wait()
        await world.admin.execute("update upload_pipeline.stages set pool = 'nobodys' where pipeline = 'probe'")
        await world.admin.execute("select * from upload_pipeline.retry_job($1, null, true)", job)
        await until_idle(world, runner)
        await world.admin.execute("update upload_pipeline.stages set pool = 'default' where pipeline = 'probe'")

    async def stop(job: Any, runner: Runner) -> None:
        await entered.wait()

    async def ended(job: Any, runner: Runner) -> None:
        await world.until_state(job, "retryable")

    await run(hang, cancel)
    await run(hang, restart)
    await run(hang, stop, shutdown_grace=0.1)
    await run(hang, ended, stage_timeout=0.3)
    await run(crash, ended)
    assert set(outcomes) == {
        f"outcome={outcome}" for outcome in ("cancelled", "lost", "released", "timed_out", "INTERNAL")
    }


def test_the_guide_names_every_metric_with_its_labels() -> None:
    calls = ProviderCalls()
    exposed: dict[str, tuple[str, ...]] = {}
    for registry in (ServiceMetrics().registry, WorkerMetrics(calls).registry, calls.registry):
        for collector in registry._collector_to_names:
            if hasattr(collector, "_labelnames"):
                suffix = "_total" if collector._type == "counter" else ""
                exposed[f"{collector._name}{suffix}"] = collector._labelnames
    rows = [line.split("|") for line in GUIDE.read_text().splitlines() if line.startswith("| `upload_pipeline_")]
    documented = {
        row[1].strip(" `"): tuple(label.strip() for label in row[2].split(",") if label.strip()) for row in rows
    }
    assert documented == exposed


async def test_idle_worker_tells_of_claims_that_gave_nothing(world: ProbeWorld) -> None:
    async with world.worker(steps_of(advance)) as runner:
        name = "worker_claims_total outcome=empty pool=default"
        await until_true(lambda: told(runner.metrics.registry).get(name, 0) > 1, "an empty claim")
        await world.admin.execute("revoke execute on function upload_pipeline.claim_jobs from upload_worker")
        name = "worker_claims_total outcome=failed pool=default"
        await until_true(lambda: told(runner.metrics.registry).get(name, 0) > 0, "a claim that failed")
