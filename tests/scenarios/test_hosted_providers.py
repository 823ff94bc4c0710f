"""Documents through both hosted providers on a bad day, 200 by name, workers killed: what was paid, by the books."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

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
TOKENS_PER_MINUTE = 400_000
PARSES_PER_MINUTE = {50: 4_000, 200: 400}
EMBEDDINGS_PER_MINUTE = {50: 1_200, 200: 60}
"""For so many documents: out of the way, and in it for minutes."""
BAD_DAY = {"rate_limited": 0.10, "server_error": 0.05, "dropped": 0.02, "hang": 0.01}
FORCED = ("dropped", "hang", "stalled")
"""What each provider does at least once: no answer, done or not, at once or never."""

FREQUENT = ("rate_limited", "server_error")

BATCH, CONCURRENCY = 8, 1
UNDER_WAY = BATCH * (2 * CONCURRENCY + 1)
"""Texts that a worker may have been answered and not stored: while requests are under way others are written, and one
more waits for its turn."""

LONGEST_WAIT = 60
"""Seconds for a worker to come into the midst of a document's texts; then any that is at work is killed."""

LONG, SECTIONS = 3, 90
"""Documents of so many sections: their texts take many requests, between which workers are killed."""
MARK = "Of claim"
"""In each of these texts."""

AT_WORK = """
    select distinct w.pid
      from upload_pipeline.upload_jobs j
      join upload_pipeline.workers w using (worker_id)
     where j.state = 'working' and j.lease_expires_at > now()
     order by w.pid
"""

STATED = {ErrorCode.PARSE_UNAVAILABLE, ErrorCode.EMBED_FAILED, ErrorCode.WORKER_LOST}
"""Why a document may end in the dead letters: a provider failed four tries of a step, or their workers died."""


@pytest.mark.parametrize("documents", [50, pytest.param(200, marks=pytest.mark.slow)])
async def test_documents_on_a_bad_day_are_paid_for_once(world: World, documents: int) -> None:
    async with (
        LlamaCloudSimulator(
            pending=0.1,
            running=0.3,
            faults=BAD_DAY,
            seed=5,
            retry_after=0.5,
            requests_per_minute=PARSES_PER_MINUTE[documents],
        ) as parses,
        NamingOpenAI(
            latency=0.1,
            faults=BAD_DAY,
            seed=7,
            retry_after=0.5,
            requests_per_minute=EMBEDDINGS_PER_MINUTE[documents],
            tokens_per_minute=TOKENS_PER_MINUTE,
            counts_failed=True,
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
            "UPLOAD_PIPELINE_LLAMAPARSE_REQUESTS_PER_MINUTE": str(PARSES_PER_MINUTE[documents]),
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
            for fault in FORCED:
                parses.misbehave(fault, operation="submit")
            kills = await _kill_workers_until_ended(world, admin, embeddings, seconds=600)
            await _check_outcomes(admin, documents)
            await _check_parses(admin, parses)
            await _check_texts(world, admin, embeddings, kills)
            print(
                parses.busiest_minute, dict(parses.books.requests), embeddings.busiest_minute, embeddings.books.requests
            )
            if documents == 200:
                asked = parses.books.requests.total()
                assert 0.8 * PARSES_PER_MINUTE[documents] < parses.busiest_minute < asked
                assert 0.8 * EMBEDDINGS_PER_MINUTE[documents] < embeddings.busiest_minute < embeddings.books.requests
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


def _start_worker(world: World, embeddings: NamingOpenAI) -> None:
    world.environment["UPLOAD_PIPELINE_OPENAI_BASE_URL"] = embeddings.address_of(len(world.workers))
    world.start_worker()


async def _kill_workers_until_ended(
    world: World, admin: asyncpg.Connection, embeddings: NamingOpenAI, *, seconds: float
) -> list[Kill]:
    choose = random.Random(11)
    for _ in range(WORKERS):
        _start_worker(world, embeddings)
    kills: list[Kill] = []
    midway = 0
    async with asyncio.timeout(seconds):
        while await live_jobs(admin):
            number = None if len(kills) % 2 or len(kills) == KILLS else await _midway(admin, embeddings)
            midway += number is not None
            if number is None:
                await asyncio.sleep(choose.uniform(0.5, 1.5))
                running = {worker.pid: i for i, worker in enumerate(world.workers) if worker.poll() is None}
                busy = [running[row["pid"]] for row in await admin.fetch(AT_WORK) if row["pid"] in running]
                number = choose.choice(busy) if busy else None
            if number is None or len(kills) == KILLS:
                continue
            world.workers[number].send_signal(signal.SIGKILL)
            await asyncio.to_thread(world.workers[number].wait)
            kills.append(await look_at_kill(admin, number))
            _start_worker(world, embeddings)
            if len(kills) == 1:
                for fault in FORCED:
                    embeddings.misbehave(fault)
    assert len(kills) >= KILLS // 2, "the documents were through before workers could be killed"
    assert midway, "no worker was killed in the midst of a document's texts"
    return kills


async def _midway(admin: asyncpg.Connection, embeddings: NamingOpenAI) -> int | None:
    """A worker that was answered more than it may have under way, and less than a document has."""
    for _ in range(LONGEST_WAIT):
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                return await embeddings.until_answered(MARK, least=UNDER_WAY + BATCH, most=SECTIONS - BATCH)
        if not await live_jobs(admin):
            break
    return None


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
    assert all(parses.books.faults[fault] > 0 for fault in (*FREQUENT, *FORCED))
    assert parses.books.lost.total() >= 2, "a job was made and nobody was told, at once and never"
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
    assert all(embeddings.books.faults[fault] > 0 for fault in (*FREQUENT, *FORCED))
    assert embeddings.books.lost.total() >= 2
