"""Documents through both hosted providers on a bad day, 200 by name, workers killed: what was paid, by the books."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import asyncpg
import psutil
import pytest
from aiohttp import web

from tests.sample_documents import make_document
from tests.scenarios.world import World, live_jobs, spread_over_users
from tests.simulators.llama_cloud import KEY as LLAMA_KEY
from tests.simulators.llama_cloud import LlamaCloudSimulator
from tests.simulators.openai_embeddings import KEY as OPENAI_KEY
from tests.simulators.openai_embeddings import OpenAISimulator
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

ON_ITS_WAY = 5.0
"""Seconds that an answer may be on its way into the database, on a busy machine. What a worker was answered that is
killed in them is paid for again."""

DYING = 1.0
"""Seconds for which the system may take a killed worker's connections for open."""

AT_WORK = """
    select distinct w.pid
      from upload_pipeline.upload_jobs j
      join upload_pipeline.workers w using (worker_id)
     where j.state = 'working' and j.lease_expires_at > now()
     order by w.pid
"""

STATED = {ErrorCode.PARSE_UNAVAILABLE, ErrorCode.EMBED_FAILED, ErrorCode.WORKER_LOST}
"""Why a document may end in the dead letters: a provider failed four tries of a step, or their workers died."""


@dataclass(frozen=True)
class Killed:
    """A worker: when it was killed, by the monotonic clock, and the ports at which it was answered."""

    at: float
    ports: frozenset[int]


class TimedOpenAI(OpenAISimulator):
    """Notes when each request came, and when and at which port of a worker each text was answered."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked_at: list[float] = []
        self.answered_at: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.asked_at.append(time.monotonic())
        response = await super().answer(request, body)
        if response.status == 200 and request.transport is not None:
            port = request.transport.get_extra_info("peername")[1]
            for text in body["input"]:
                self.answered_at[text].append((time.monotonic(), port))
        return response


@pytest.mark.parametrize("documents", [50, pytest.param(200, marks=pytest.mark.slow)])
async def test_documents_on_a_bad_day_are_paid_for_once(world: World, documents: int) -> None:
    async with (
        LlamaCloudSimulator(
            pending=0.1, running=0.3, faults=BAD_DAY, seed=5, retry_after=0.5, requests_per_minute=PARSES_PER_MINUTE
        ) as parses,
        TimedOpenAI(
            latency=0.05,
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
            "UPLOAD_PIPELINE_OPENAI_BASE_URL": embeddings.url,
            "UPLOAD_PIPELINE_OPENAI_DIMENSIONS": str(DIMENSIONS),
            "UPLOAD_PIPELINE_OPENAI_TIMEOUT": "3",
            "UPLOAD_PIPELINE_EMBED_BATCH_SIZE": "8",
            "UPLOAD_PIPELINE_WORKER_CONCURRENCY": "12",
        }
        admin = await asyncpg.connect(world.admin_url)
        try:
            # The run is about kills and faults, not about the waits that they lead to.
            name = await admin.fetchval("select current_database()")
            await admin.execute(f"""alter database "{name}" set upload_pipeline.backoff_base = '300 milliseconds'""")
            await _take_in(world, documents)
            killed = await _kill_workers_until_ended(world, admin, seconds=600)
            await _check_outcomes(admin, documents)
            await _check_books(admin, parses, embeddings, killed)
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
    paths = []
    for seed in range(documents):
        kind = "html" if seed % 4 else "pdf"
        path = folder / f"claim-{seed}.{kind}"
        path.write_bytes(make_document(kind, seed, pages=1 + seed % MOST_PAGES))  # type: ignore[arg-type]
        paths.append(path)
    await world.ingest(spread_over_users(paths, users=USERS))


async def _kill_workers_until_ended(world: World, admin: asyncpg.Connection, *, seconds: float) -> list[Killed]:
    choose = random.Random(11)
    running = {worker.pid: worker for worker in (world.start_worker() for _ in range(WORKERS))}
    killed: list[Killed] = []
    async with asyncio.timeout(seconds):
        while await live_jobs(admin):
            await asyncio.sleep(choose.uniform(1.0, 3.0))
            busy = [row["pid"] for row in await admin.fetch(AT_WORK) if row["pid"] in running]
            if busy and len(killed) < KILLS:
                victim = running.pop(choose.choice(busy))
                ports = frozenset(c.laddr.port for c in psutil.Process(victim.pid).net_connections("tcp"))
                victim.send_signal(signal.SIGKILL)
                killed.append(Killed(time.monotonic(), ports))
                await asyncio.to_thread(victim.wait)
                successor = world.start_worker()
                running[successor.pid] = successor
    assert len(killed) >= KILLS // 2, "the documents were through before workers could be killed"
    return killed


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


async def _check_books(
    admin: asyncpg.Connection, parses: LlamaCloudSimulator, embeddings: TimedOpenAI, killed: list[Killed]
) -> None:
    # A job whose answer was dropped is found again by listing, so even lost answers cost nothing.
    assert parses.books.paid_again() == {}
    assert parses.books.over_limit == 0
    assert all(parses.books.faults[fault] > 0 for fault in FREQUENT)

    rows = await admin.fetch("select text from upload_pipeline.document_chunks where live")
    needed = Counter(row["text"] for row in rows)
    assert set(needed) <= set(embeddings.books.paid)
    again = {
        text: times - needed[text] - embeddings.books.lost[text]
        for text, times in embeddings.books.paid.items()
        if times > max(1, needed[text]) + embeddings.books.lost[text]
    }
    excused = {
        text
        for text in again
        if any(
            worker.at - ON_ITS_WAY <= answered <= worker.at + DYING and port in worker.ports
            for answered, port in embeddings.answered_at[text]
            for worker in killed
        )
    }
    assert {text: embeddings.answered_at[text] for text in set(again) - excused} == {}, killed
    assert len(excused) <= KILLS * 8 * 4, "more than the requests that a killed worker had under way"
    assert embeddings.books.over_limit == 0
    assert embeddings.books.faults["rate_limited"] > 0
    # A parse is recorded when its result comes: of a document that died before that it is in the books alone.
    counted = await admin.fetchval("select sum(pages) from upload_pipeline.usage_records where provider = 'llamaparse'")
    dead = await admin.fetchval("select count(*) from upload_pipeline.upload_jobs where state = 'deadletter'")
    assert parses.books.pages - MOST_PAGES * dead <= counted <= parses.books.pages
