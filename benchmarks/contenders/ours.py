"""This queue: the real runner with its heartbeat, every write fenced, every transition with its event.

`drain` takes jobs of one step, or of ten, as many as a document's. Like the others it is set up for throughput:
twenty users with a hundred jobs at work each, so that a claim takes many jobs of few lanes. `enqueue_users` is the hard
case: 500 users with the default cap of two, so that a claim takes one or two jobs of each lane.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import asyncpg

from benchmarks.contenders import until_drained
from upload_pipeline.database import queue
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.logs import configure_logs
from upload_pipeline.settings import load_settings
from upload_workers.process import running_worker
from upload_workers.steps import Advance, Outcome, Step, StepContext

STEPS_OF_MANY = 10
UNFINISHED = "select exists (select from upload_pipeline.upload_jobs where state in ('queued', 'working', 'retryable'))"


async def nothing(job: ClaimedJob, context: StepContext) -> Outcome:
    """A step that does nothing."""
    del job, context
    return Advance()


def _steps() -> dict[tuple[str, str], Step]:
    many: dict[tuple[str, str], Step] = {("bench_many", f"stage_{i}"): nothing for i in range(STEPS_OF_MANY)}
    return {("bench_one", "todo"): nothing, **many}


async def setup(url: str) -> None:
    """Adds the two pipelines, in a pool that nobody else serves; the schema is migrated already."""
    connection = await asyncpg.connect(url)
    await connection.executemany(
        "insert into upload_pipeline.stages values ($1, $2, $3, 0, 'bench', $4) on conflict do nothing",
        [
            ("bench_one", "todo", 0, False),
            ("bench_one", "finished", 1, True),
            *[("bench_many", f"stage_{i}", i, i == STEPS_OF_MANY) for i in range(STEPS_OF_MANY + 1)],
        ],
    )
    await connection.close()


async def _enqueue(url: str, n: int, pipeline: str, *, users: int, cap: int) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("truncate upload_pipeline.documents, upload_pipeline.events cascade")
    await connection.execute("truncate upload_pipeline.lanes")
    rows = await connection.fetch(
        """
        insert into upload_pipeline.documents
          (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
        select d.id, ($1::uuid[])[1 + d.i % cardinality($1)], 'bench', 'text/plain', 1,
               encode(sha256(d.id::text::bytea), 'hex'), d.id::text
          from (select gen_random_uuid() as id, i from generate_series(1, $2::int) i) d
        returning document_id, user_id
        """,
        [uuid4() for _ in range(users)],
        n,
    )
    documents = [(row["document_id"], row["user_id"]) for row in rows]
    for begin in range(0, n, 1000):
        await queue.enqueue_jobs(connection, documents[begin : begin + 1000], pipeline=pipeline)
    await connection.execute("update upload_pipeline.lanes set max_in_flight = $1", cap)
    await connection.execute("vacuum analyze upload_pipeline.upload_jobs")
    await connection.close()


async def enqueue(url: str, n: int) -> None:
    """Adds n jobs of one step, of few users."""
    await _enqueue(url, n, "bench_one", users=20, cap=100)


async def enqueue_users(url: str, n: int) -> None:
    """Adds n jobs of one step, of many users at the default cap."""
    await _enqueue(url, n, "bench_one", users=500, cap=2)


async def enqueue_stages(url: str, n: int) -> None:
    """Adds n jobs of ten steps, of few users."""
    await _enqueue(url, n, "bench_many", users=20, cap=100)


async def drain(url: str, n: int) -> float:
    """One worker, up to 1,000 jobs at once."""
    del n
    watcher = await asyncpg.connect(url)
    worker_url = url.replace("//postgres", "//upload_worker", 1)
    with TemporaryDirectory() as home:
        settings = load_settings(home=Path(home), database_url=worker_url, log_level="error")
        configure_logs(settings)
        began = time.perf_counter()
        async with running_worker(settings, worker_url, pools=["bench"], concurrency=1000, steps=_steps()) as runner:
            while runner.claimed == 0:
                began = time.perf_counter()
                await asyncio.sleep(0)
            await until_drained(watcher, UNFINISHED)
            seconds = time.perf_counter() - began
    await watcher.close()
    return seconds
