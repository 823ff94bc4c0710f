"""pgqueuer: asyncpg, uvloop, five dequeue tasks with batches of 100, its autovacuum settings applied.

Five tasks is what its authors' benchmark runs; batches of 100 are quicker here than their 10.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries

from benchmarks.contenders import Counter, until_drained


async def setup(url: str) -> None:
    """Installs its schema, unless it is there."""
    connection = await asyncpg.connect(url)
    if await connection.fetchval("select to_regclass('pgqueuer') is null"):
        queries = Queries(AsyncpgDriver(connection))
        await queries.install()
        await queries.optimize_autovacuum()
    await connection.close()


async def enqueue(url: str, n: int) -> None:
    """Adds n jobs by its bulk call."""
    connection = await asyncpg.connect(url)
    await connection.execute("truncate pgqueuer, pgqueuer_log")
    queries = Queries(AsyncpgDriver(connection))
    for begin in range(0, n, 1000):
        size = min(1000, n - begin)
        await queries.enqueue(["nothing"] * size, [b"1"] * size, [0] * size)
    await connection.execute("vacuum analyze pgqueuer")
    await connection.close()


async def drain(url: str, n: int) -> float:
    """One process, five dequeue tasks, batches of 100."""
    counter = Counter(n)
    workers, connections = [], []
    for _ in range(5):
        connection = await asyncpg.connect(url)
        worker = PgQueuer(AsyncpgDriver(connection))

        @worker.entrypoint("nothing")
        async def nothing(job: object) -> None:
            del job
            counter.hit()

        workers.append(worker)
        connections.append(connection)
    watcher = await asyncpg.connect(url)
    began = time.perf_counter()
    running = [asyncio.create_task(worker.run(batch_size=100)) for worker in workers]
    await counter.all_handled.wait()
    await until_drained(watcher, "select exists (select from pgqueuer)")
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.shutdown.set()
    await asyncio.gather(*running, return_exceptions=True)
    for connection in (*connections, watcher):
        await connection.close()
    return seconds
