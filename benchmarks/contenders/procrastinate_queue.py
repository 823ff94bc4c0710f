"""procrastinate: psycopg connector, asynchronous task, concurrency 10, LISTEN on: the quickest of its settings here."""

from __future__ import annotations

import asyncio
import time

import procrastinate
import psycopg

from benchmarks.contenders import Counter


def _app(url: str, counter: Counter | None = None) -> procrastinate.App:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, min_size=4, max_size=20))

    @app.task(queue="bench", name="nothing")
    async def nothing(number: int) -> None:
        del number
        if counter is not None:
            counter.hit()

    return app


async def setup(url: str) -> None:
    """Applies its schema, unless it is there."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        row = await (await connection.execute("select to_regclass('procrastinate_jobs')")).fetchone()
    if row is not None and row[0] is None:
        app = _app(url)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()


async def enqueue(url: str, n: int) -> None:
    """Adds n jobs by its bulk call."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("truncate procrastinate_jobs cascade")
        app = _app(url)
        async with app.open_async():
            for begin in range(0, n, 1000):
                batch = ({"number": i} for i in range(begin, min(begin + 1000, n)))
                await app.tasks["nothing"].batch_defer_async(*batch)
        await connection.execute("vacuum analyze procrastinate_jobs")


async def drain(url: str, n: int) -> float:
    """One worker, concurrency 10."""
    counter = Counter(n)
    app = _app(url, counter)
    async with app.open_async(), await psycopg.AsyncConnection.connect(url, autocommit=True) as watcher:
        began = time.perf_counter()
        worker = asyncio.create_task(
            app.run_worker_async(queues=["bench"], concurrency=10, install_signal_handlers=False)
        )
        await counter.all_handled.wait()
        unfinished = "select exists (select from procrastinate_jobs where status in ('todo', 'doing'))"
        while (row := await (await watcher.execute(unfinished)).fetchone()) and row[0]:
            await asyncio.sleep(0.01)
        seconds = time.perf_counter() - began
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
    return seconds
