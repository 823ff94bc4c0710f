"""The document pipeline with PARSER=llamaparse, against the simulator: faults, kills, a zombie, an empty account."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sample_documents import make_document

from tests.scenarios.paid_world import rows, run_command
from tests.scenarios.service_process import service_process
from tests.scenarios.world import World, spread_over_users, write_documents
from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator

KILLABLE = Path(__file__).parents[1] / "workers" / "killable_worker.py"
SECRET = "what LlamaParse signs with in these tests"


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[LlamaCloudSimulator]:
    async with LlamaCloudSimulator(running=0.3) as simulator:
        world.environment |= {
            "UPLOAD_PIPELINE_PARSER": "llamaparse",
            "UPLOAD_PIPELINE_LLAMAPARSE_API_KEY": KEY,
            "UPLOAD_PIPELINE_LLAMAPARSE_BASE_URL": simulator.url,
            "UPLOAD_PIPELINE_LLAMAPARSE_TIMEOUT": "2",
            "UPLOAD_PIPELINE_LLAMAPARSE_POLL": "0.3",
            "UPLOAD_PIPELINE_LLAMAPARSE_REQUESTS_PER_MINUTE": "0",
            "UPLOAD_PIPELINE_PRICES": '{"llamaparse/cost_effective": {"credits": 1.25}}',
        }
        yield simulator
        world.kill_all()


def start_submitter(world: World) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        **world.environment,
        "UPLOAD_PIPELINE_HOME": str(world.home),
        "UPLOAD_PIPELINE_DATABASE_URL": world.worker_url,
    }
    command = [sys.executable, str(KILLABLE), "job_validated"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def write_pdfs(world: World, count: int) -> list[Path]:
    folder = world.home / "files"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"claim-{number}.pdf" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(make_document("pdf", seed=number, pages=2))
    return paths


@pytest.mark.slow
async def test_documents_of_each_kind_are_parsed_through_faults_and_a_killed_worker_and_each_is_paid_for_once(
    world: World, simulator: LlamaCloudSimulator
) -> None:
    files = write_documents(world.home / "files", 10)
    hosted = sum(path.suffix in (".pdf", ".docx", ".html") for path in files)
    await world.ingest(spread_over_users(files, users=5))
    simulator.seed = 5
    simulator.faults = {"rate_limited": 0.1, "server_error": 0.05, "dropped": 0.05, "truncated": 0.02}
    simulator.retry_after = 0.2
    victim = world.start_worker()
    async with asyncio.timeout(60):
        while not simulator.books.paid:
            await asyncio.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    world.start_worker()
    assert await asyncio.to_thread(victim.wait) != 0
    assert await world.until_ended(120) == {"done": 10}

    assert len(simulator.books.paid) == hosted
    assert simulator.books.paid_again() == {}
    used = await rows(world, "select * from upload_pipeline.usage_records")
    assert len(used) == hosted
    assert sum(row["credits"] for row in used) == simulator.books.credits
    told = await run_command(world, "usage", "--by", "model", "--json")
    line = json.loads(told.stdout)
    assert (line["model"], line["pages"]) == ("llamaparse/cost_effective/2026-09-28", simulator.books.pages)
    assert line["cost_usd"] == pytest.approx(simulator.books.credits * 1.25 / 1000)
    costs = await rows(world, "select results -> 'cost' ->> 'pages' as pages from upload_pipeline.job_outcomes")
    assert sum(int(row["pages"]) for row in costs if row["pages"]) == simulator.books.pages


async def test_a_worker_that_is_killed_between_the_submission_and_its_record_leaves_one_paid_parse(
    world: World, simulator: LlamaCloudSimulator
) -> None:
    await world.ingest(spread_over_users(write_pdfs(world, 1), users=1))
    victim = start_submitter(world)
    try:
        assert victim.stdout is not None
        async with asyncio.timeout(60):
            told = await asyncio.to_thread(victim.stdout.readline)
        assert told
        (submission,) = await rows(world, "select * from upload_pipeline.parse_submissions")
        assert submission["called_at"] is not None
        assert submission["parse_id"] is None
    finally:
        victim.kill()
        victim.communicate()
    world.start_worker()
    assert await world.until_ended(60) == {"done": 1}
    assert simulator.books.requests["submit"] == 1
    assert list(simulator.books.paid.values()) == [1]


@pytest.mark.slow
async def test_a_worker_that_slept_while_it_submitted_pays_nothing_when_it_wakes(
    world: World, simulator: LlamaCloudSimulator
) -> None:
    """It is stopped with its call announced: the other finds what the call made, or makes it once the call is over."""
    await world.ingest(spread_over_users(write_pdfs(world, 4), users=4))
    zombie = world.start_worker()
    announced = "select 1 from upload_pipeline.parse_submissions where called_at is not null and parse_id is null"
    async with asyncio.timeout(60):
        while not await rows(world, announced):
            await asyncio.sleep(0.002)
    zombie.send_signal(signal.SIGSTOP)
    world.start_worker()
    assert await world.until_ended(60) == {"done": 4}
    zombie.send_signal(signal.SIGCONT)
    await asyncio.sleep(2)
    assert len(simulator.books.paid) == 4
    assert simulator.books.paid_again() == {}


@pytest.mark.slow
async def test_an_empty_account_puts_jobs_off_with_one_alarm_and_a_filled_one_goes_on(
    world: World, simulator: LlamaCloudSimulator
) -> None:
    await world.ingest(spread_over_users(write_pdfs(world, 3), users=3))
    simulator.misbehave("quota", times=100)
    world.start_worker()
    waiting = """
        select retry_count, run_at - now() as left from upload_pipeline.upload_jobs
         where stage = 'job_validated' and state = 'retryable'
    """
    async with asyncio.timeout(60):
        while len(jobs := await rows(world, waiting)) < 3:
            await asyncio.sleep(0.1)
    assert all(job["retry_count"] == 0 and job["left"].total_seconds() > 500 for job in jobs)
    alarms = await rows(world, "select payload from upload_pipeline.events where code = 'provider_paused'")
    assert [json.loads(alarm["payload"])["code"] for alarm in alarms] == ["PARSE_QUOTA"]
    assert simulator.books.requests["submit"] == 0

    simulator._asked.clear()
    await rows(world, "update upload_pipeline.provider_budgets set frozen_until = null")
    await rows(world, "update upload_pipeline.upload_jobs set run_at = now() where state = 'retryable'")
    assert await world.until_ended(60) == {"done": 3}
    assert simulator.books.paid_again() == {}


async def test_the_webhook_ends_the_wait_and_doctor_looks_at_the_key(
    world: World, simulator: LlamaCloudSimulator
) -> None:
    await world.ingest(spread_over_users(write_pdfs(world, 2), users=2))
    simulator.webhooks_doubled = simulator.webhooks_reversed = True
    simulator.running = 3600
    world.environment |= {
        "UPLOAD_PIPELINE_LLAMAPARSE_POLL": "60",
        "UPLOAD_PIPELINE_LLAMAPARSE_WEBHOOK_SECRET": SECRET,
    }
    with service_process(world.worker_url, world.home / "service", llamaparse_webhook_secret=SECRET) as service:
        world.environment["UPLOAD_PIPELINE_API_PUBLIC_URL"] = service.url
        world.start_worker()
        waiting = """
            select 1 from upload_pipeline.upload_jobs j join upload_pipeline.documents d using (document_id)
             where d.parse_id is not null and j.state = 'retryable'
        """
        async with asyncio.timeout(120):
            while len(await rows(world, waiting)) < 2:
                await asyncio.sleep(0.1)
        simulator.running = 0
        assert await world.until_ended(50) == {"done": 2}
    assert simulator.books.webhooks["sent"] == simulator.books.webhooks["taken"] == 4
    assert simulator.books.paid_again() == {}

    # a machine that is busy may take its time over the first request
    world.environment["UPLOAD_PIPELINE_LLAMAPARSE_TIMEOUT"] = "30"
    world.environment["UPLOAD_PIPELINE_API_PUBLIC_URL"] = "https://files.example.com"
    world.environment["UPLOAD_PIPELINE_LLAMAPARSE_API_KEY"] = "llx-wrong"
    checked = await run_command(world, "doctor")
    assert checked.returncode == 1
    assert "PARSE_DENIED" in checked.stdout
    del world.environment["UPLOAD_PIPELINE_LLAMAPARSE_API_KEY"]
    started = await asyncio.to_thread(world.start_worker().wait, 60)
    assert started != 0
    assert "UPLOAD_PIPELINE_LLAMAPARSE_API_KEY" in (world.home / f"worker-{len(world.workers) - 1}.log").read_text()
