"""Documents through both hosted providers on a bad day, 200 by name, workers killed: what was paid, by the books."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter, defaultdict
from pathlib import Path
from subprocess import Popen

import asyncpg
import pytest

from tests.sample_documents import make_document
from tests.scenarios.paid_answers import (
    Kill,
    NamingOpenAI,
    look_at_kill,
    paid_though_kept,
    paid_too_often,
)
from tests.scenarios.paid_world import needed
from tests.scenarios.world import World, live_jobs, spread_over_users
from tests.simulators.llama_cloud import KEY as LLAMA_KEY
from tests.simulators.llama_cloud import LlamaCloudSimulator
from tests.simulators.openai_embeddings import KEY as OPENAI_KEY
from upload_pipeline.errors import ErrorCode

USERS = 25
WORKERS = 2
KILLS = 4
DIMENSIONS = 16
MOST_PAGES = 3
PARSES_PER_MINUTE, TOKENS_PER_MINUTE = 4_000, 400_000
EMBEDDINGS_PER_MINUTE = {50: 1_200, 200: 100}
"""For so many documents: out of the way, and in it for minutes."""
BAD_DAY = {"rate_limited": 0.10, "server_error": 0.05, "dropped": 0.02, "hang": 0.01}

FREQUENT = ("rate_limited", "server_error")

BATCH, CONCURRENCY = 8, 1
UNDER_WAY = BATCH * (2 * CONCURRENCY + 1)
"""Texts that a worker may have been answered and not stored: while requests are under way others are written, and one
more waits for its turn."""

LONG, SECTIONS = 3, 90
"""Documents of so many sections: their texts take many requests, between which workers are killed."""

AT_WORK = """
    select distinct w.pid
      from upload_pipeline.upload_jobs j
      join upload_pipeline.workers w using (worker_id)
     where j.state = 'working' and j.lease_expires_at > now()
     order by w.pid
"""

EMBEDDED = """
    select w.pid, c.text
      from upload_pipeline.upload_jobs j
      join upload_pipeline.workers w using (worker_id)
      join upload_pipeline.document_chunks c using (document_id)
     where j.state = 'working' and j.stage = 'embedding' and j.lease_expires_at > now()
"""

STATED = {ErrorCode.PARSE_UNAVAILABLE, ErrorCode.EMBED_FAILED, ErrorCode.WORKER_LOST}
"""Why a document may end in the dead letters: a provider failed four tries of a step, or their workers died."""


@pytest.mark.parametrize("documents", [50, pytest.param(200, marks=pytest.mark.slow)])
async def test_documents_on_a_bad_day_are_paid_for_once(world: World, documents: int) -> None:
    async with (
        LlamaCloudSimulator(
            pending=0.1, running=0.3, faults=BAD_DAY, seed=5, retry_after=0.5, requests_per_minute=PARSES_PER_MINUTE
        ) as parses,
        NamingOpenAI(
            latency=0.1,
            faults=BAD_DAY,
            seed=7,
            retry_after=0.5,
            requests_per_minute=EMBEDDINGS_PER_MINUTE[documents],
            tokens_per_minute=TOKENS_PER_MINUTE,
        ) as embeddings,
    ):
        world.environment |= {
            "UPLOAD_PIPELINE_LEASE_TTL": "5",
            "UPLOAD_PIPELINE_HEARTBEAT_INTERVAL": "1",
            "UPLOAD_PIPELINE_PARSER": "llamaparse",
            "UPLOAD_PIPELINE_LLAMAPARSE_API_KEY": LLAMA_KEY,
            "UPLOAD_PIPELINE_LLAMAPARSE_BASE_URL": parses.url,
            "UPLOAD_PIPELINE_LLAMAPARSE_TIMEOUT": "3",
            "UPLOAD_PIPELINE_LLAMAPARSE_POLL": "0.3",
            "UPLOAD_PIPELINE_LLAMAPARSE_REQUESTS_PER_MINUTE": str(PARSES_PER_MINUTE),
            "UPLOAD_PIPELINE_EMBEDDER": "openai",
            "UPLOAD_PIPELINE_OPENAI_API_KEY": OPENAI_KEY,
            "UPLOAD_PIPELINE_OPENAI_DIMENSIONS": str(DIMENSIONS),
            "UPLOAD_PIPELINE_OPENAI_TIMEOUT": "3",
            "UPLOAD_PIPELINE_OPENAI_CONCURRENCY": str(CONCURRENCY),
            "UPLOAD_PIPELINE_EMBED_BATCH_SIZE": str(BATCH),
            "UPLOAD_PIPELINE_WORKER_CONCURRENCY": "12",
        }
        admin = await asyncpg.connect(world.admin_url)
        try:
            # The run is about kills and faults, not about the waits that they lead to.
            name = await admin.fetchval("select current_database()")
            await admin.execute(f"""alter database "{name}" set upload_pipeline.backoff_base = '300 milliseconds'""")
            await _take_in(world, documents)
            kills = await _kill_workers_until_ended(world, admin, embeddings, seconds=600)
            await _check_outcomes(admin, documents)
            await _check_parses(admin, parses)
            await _check_texts(world, admin, embeddings, kills)
            if documents == 200:
                limit, asked = EMBEDDINGS_PER_MINUTE[documents], embeddings.asked_at
                busiest = max(sum(at <= other < at + 60 for other in asked) for at in asked)
                assert busiest > 0.8 * limit, "nobody came near the limit"
                assert len(asked) > limit, "a minute was enough"
        finally:
            await admin.close()
            world.kill_all()


async def _take_in(world: World, documents: int) -> None:
    folder = world.home / "files"
    folder.mkdir()
    paths = [_long_document(folder / "long-0.html", 0), _long_document(folder / "long-1.html", 1)]
    for seed in range(documents - LONG):
        kind = "html" if seed % 4 else "pdf"
        path = folder / f"claim-{seed}.{kind}"
        path.write_bytes(make_document(kind, seed, pages=1 + seed % MOST_PAGES))  # type: ignore[arg-type]
        paths.append(path)
    # the first is another user's too, who pays for it again
    await world.ingest(spread_over_users([*paths, paths[0]], users=USERS))


def _long_document(path: Path, number: int) -> Path:
    """Sections of words of their own, and now and then one that stands in the document several times."""
    terms = "# Terms\n\n" + " ".join(f"The deductible of clause {number}.{part} applies once." for part in range(40))
    parts = ["<!doctype html>\n<html><body>"]
    for section in range(SECTIONS):
        parts.append(f"# Section {section}")
        parts.append(" ".join(f"Of claim {number}.{section}, part {part} was looked at." for part in range(40)))
        if section % 20 == 10:
            parts.append(terms)
    path.write_text("\n\n".join(parts))
    return path


def _start_worker(world: World, embeddings: NamingOpenAI) -> Popen[bytes]:
    world.environment["UPLOAD_PIPELINE_OPENAI_BASE_URL"] = embeddings.address_of(len(world.workers))
    return world.start_worker()


async def _kill_workers_until_ended(
    world: World, admin: asyncpg.Connection, embeddings: NamingOpenAI, *, seconds: float
) -> list[Kill]:
    choose = random.Random(11)
    running = {worker.pid: worker for worker in (_start_worker(world, embeddings) for _ in range(WORKERS))}
    kills: list[Kill] = []
    midway = 0
    async with asyncio.timeout(seconds):
        while await live_jobs(admin):
            await asyncio.sleep(choose.uniform(0.5, 1.5))
            if len(kills) == KILLS:
                continue
            busy = [row["pid"] for row in await admin.fetch(AT_WORK)]
            if len(kills) % 2 == 0:
                busy = await _embedding_midway(admin, embeddings)
            busy = [pid for pid in busy if pid in running]
            if busy:
                midway += len(kills) % 2 == 0
                victim = running.pop(choose.choice(busy))
                victim.send_signal(signal.SIGKILL)
                await asyncio.to_thread(victim.wait)
                kills.append(await look_at_kill(admin, world.workers.index(victim)))
                successor = _start_worker(world, embeddings)
                running[successor.pid] = successor
    assert len(kills) >= KILLS // 2, "the documents were through before workers could be killed"
    assert midway, "no worker was killed in the midst of a document's texts"
    return kills


async def _embedding_midway(admin: asyncpg.Connection, embeddings: NamingOpenAI) -> list[int]:
    """Workers of whose documents many texts were answered and others were not, as soon as there are any."""
    while await live_jobs(admin):
        texts = defaultdict[int, set[str]](set)
        for row in await admin.fetch(EMBEDDED):
            texts[row["pid"]].add(row["text"])
        answered = {paid.text for paid in embeddings.payments}
        midway = [
            pid for pid, its in texts.items() if len(its & answered) > 2 * UNDER_WAY and len(its - answered) > BATCH
        ]
        if midway:
            return midway
        await asyncio.sleep(0.02)
    return []


async def _check_outcomes(admin: asyncpg.Connection, documents: int) -> None:
    jobs = await admin.fetch(
        """
        select j.state::text as state, o.error_code, d.searchable_at is not null as searchable
          from upload_pipeline.upload_jobs j
          join upload_pipeline.documents d using (document_id)
          left join upload_pipeline.job_outcomes o using (job_id)
        """
    )
    assert len(jobs) == documents
    assert {job["state"] for job in jobs} <= {"done", "deadletter"}
    assert all(job["searchable"] == (job["state"] == "done") for job in jobs)
    dead = [job["error_code"] for job in jobs if job["state"] == "deadletter"]
    assert set(dead) <= STATED
    assert len(dead) <= documents // 20 + 1
    reaped = await admin.fetchval("select count(*) from upload_pipeline.events where code = 'job_reaped'")
    assert reaped > 0, "no worker was killed with a job in its hands"


async def _check_parses(admin: asyncpg.Connection, parses: LlamaCloudSimulator) -> None:
    # A job whose answer was dropped is found again by listing, so even lost answers cost nothing.
    assert parses.books.paid_again() == {}
    assert parses.books.over_limit == 0
    assert all(parses.books.faults[fault] > 0 for fault in FREQUENT)
    # A parse is recorded when its result comes: of a document that died before that it is in the books alone.
    counted = await admin.fetchval("select sum(pages) from upload_pipeline.usage_records where provider = 'llamaparse'")
    dead = await admin.fetchval("select count(*) from upload_pipeline.upload_jobs where state = 'deadletter'")
    assert parses.books.pages - MOST_PAGES * dead <= counted <= parses.books.pages


async def _check_texts(world: World, admin: asyncpg.Connection, embeddings: NamingOpenAI, kills: list[Kill]) -> None:
    texts = await needed(world)
    assert Counter(texts.values())[2] > SECTIONS, "texts that two users have"
    live = await admin.fetch("select distinct text from upload_pipeline.document_chunks where live")
    assert {row["text"] for row in live} <= set(embeddings.books.paid) <= set(texts)
    for kill in kills:
        assert kill.kept, "nothing was stored when a worker was killed"
        assert sum(kill.unstored(embeddings).values()) <= UNDER_WAY, "an answer is stored when it comes"
        assert paid_though_kept(embeddings, texts, kill) == {}
    assert paid_too_often(embeddings, texts, kills) == {}
    assert embeddings.books.over_limit == 0
    assert embeddings.books.faults["rate_limited"] > 0
