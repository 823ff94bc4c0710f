"""The document pipeline with EMBEDDER=openai, against the simulator: faults, a kill, an empty account, search."""

from __future__ import annotations

import asyncio
import json
import signal

import numpy as np
import pytest

from tests.scenarios.paid_world import DIMENSIONS, paid_more_than_needed, rows, run_command
from tests.scenarios.world import World, spread_over_users, write_documents
from tests.simulators.openai_embeddings import Fault, OpenAISimulator, vector_of


async def test_faults_and_a_killed_worker_leave_every_vector_and_nothing_paid_twice(
    world: World, simulator: OpenAISimulator
) -> None:
    files = write_documents(world.home / "files", 12)
    files.append(world.home / "files" / "terms.md")
    terms = "# Terms\n\n" + "The deductible applies once. " * 50
    files[-1].write_text("\n\n".join([terms, "# Scope\n\n" + "Wear is excluded. " * 80] * 3))
    await world.ingest(spread_over_users(files, users=4))
    simulator.latency = 0.3
    simulator.faults = {"rate_limited": 0.1, "server_error": 0.05, "dropped": 0.05, "truncated": 0.02, "hang": 0.01}
    simulator.retry_after = 0.2
    world.environment["UPLOAD_PIPELINE_OPENAI_CONCURRENCY"] = "2"
    victim = world.start_worker()
    async with asyncio.timeout(60):
        while True:
            (kept,) = await rows(world, "select count(*) as n from upload_pipeline.embedding_cache")
            # Something is under way, and all that was paid for is stored; nothing is answered before the kill.
            if simulator._in_flight and kept["n"] == len(simulator.books.paid) > 0:
                break
            await asyncio.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    world.start_worker()
    assert await asyncio.to_thread(victim.wait) != 0
    assert await world.until_ended(120) == {"done": 13}

    assert await paid_more_than_needed(world, simulator) == {}
    assert simulator.books.over_limit == 0
    chunks = await rows(world, "select text, embed_model, embedding::text from upload_pipeline.document_chunks")
    for row in chunks:
        assert row["embed_model"] == f"text-embedding-3-small@{DIMENSIONS}"
        stored = np.array(json.loads(row["embedding"]))
        np.testing.assert_allclose(stored, vector_of(row["text"], DIMENSIONS), rtol=1e-4, atol=1e-6)


async def test_an_empty_account_puts_jobs_off_with_one_alarm_and_no_retry(
    world: World, simulator: OpenAISimulator
) -> None:
    files = write_documents(world.home / "files", 4)
    await world.ingest(spread_over_users(files, users=4))
    simulator.misbehave(Fault.QUOTA, times=100)
    world.start_worker()
    waiting = """
        select retry_count, run_at - now() as left from upload_pipeline.upload_jobs
         where stage = 'embedding' and state = 'retryable'
    """
    async with asyncio.timeout(60):
        while len(jobs := await rows(world, waiting)) < 4:
            await asyncio.sleep(0.1)
    assert all(job["retry_count"] == 0 and job["left"].total_seconds() > 500 for job in jobs)
    alarms = await rows(world, "select payload from upload_pipeline.events where code = 'provider_paused'")
    assert [json.loads(alarm["payload"])["code"] for alarm in alarms] == ["EMBED_QUOTA"]
    assert simulator.books.requests <= 4


async def test_search_doctor_and_a_poison_text(world: World, simulator: OpenAISimulator) -> None:
    folder = world.home / "files"
    folder.mkdir(parents=True)
    (folder / "good.md").write_text("# Deductible\n\nWater damage has a deductible of 1,500 USD.\n")
    (folder / "bad.md").write_text("# Venom\n\nThis sentence is not taken by anybody.\n")
    simulator.poison["not taken by anybody"] = Fault.REJECTED
    done = await run_command(world, "ingest", str(folder / "good.md"), str(folder / "bad.md"), "--json")
    assert "EMBED_REJECTED" in done.stdout
    states = await rows(world, "select state, retry_count from upload_pipeline.upload_jobs order by state")
    assert sorted(tuple(row) for row in states) == [("deadletter", 0), ("done", 0)]
    assert await paid_more_than_needed(world, simulator) == {}

    (text,) = await rows(world, "select text from upload_pipeline.document_chunks where live")
    found = await run_command(world, "search", text["text"], "--mode", "vector", "--json")
    assert found.returncode == 0, found.stderr
    (hit,) = json.loads(found.stdout)["hits"]
    assert hit["filename"] == "good.md"
    assert hit["score"] == pytest.approx(1.0, abs=1e-4)

    checked = await run_command(world, "doctor")
    assert "text-embedding-3-small@32, 32 dimensions" in checked.stdout
    del world.environment["UPLOAD_PIPELINE_OPENAI_API_KEY"]
    checked = await run_command(world, "doctor")
    assert checked.returncode == 1
    assert "UPLOAD_PIPELINE_OPENAI_API_KEY" in checked.stdout
