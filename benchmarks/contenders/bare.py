"""A bare `SKIP LOCKED` loop through asyncpg: what the database itself allows, with none of what a queue is for.

No retries, no leases, no fence, no caps, no history. `one` claims and completes one job a statement over 16
connections; `hundred` a hundred at a time over two.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg

from benchmarks.contenders import until_drained

DDL = """
drop table if exists bare_jobs;
create table bare_jobs (
  id bigint generated always as identity primary key,
  state smallint not null default 0,
  claimed_at timestamptz,
  done_at timestamptz,
  payload integer not null
);
create index bare_jobs_ready on bare_jobs (id) where state = 0;
create index bare_jobs_busy on bare_jobs (id) where state = 1;
"""
CLAIM = """
update bare_jobs set state = 1, claimed_at = now()
 where id = any (array(select id from bare_jobs where state = 0 order by id limit $1 for update skip locked))
returning id
"""
COMPLETE = "update bare_jobs set state = 2, done_at = now() where id = any ($1::bigint[]) and state = 1"


async def setup(url: str) -> None:
    """Makes the table."""
    connection = await asyncpg.connect(url)
    await connection.execute(DDL)
    await connection.close()


async def enqueue(url: str, n: int) -> None:
    """Adds n jobs."""
    connection = await asyncpg.connect(url)
    await connection.execute("truncate bare_jobs")
    await connection.execute("insert into bare_jobs (payload) select generate_series(1, $1::int)", n)
    await connection.execute("vacuum analyze bare_jobs")
    await connection.close()


async def _drain(url: str, *, batch: int, connections: int) -> float:
    async def loop() -> None:
        connection = await asyncpg.connect(url)
        claim, complete = await connection.prepare(CLAIM), await connection.prepare(COMPLETE)
        while rows := await claim.fetch(batch):
            await complete.fetch([row["id"] for row in rows])
        await connection.close()

    watcher = await asyncpg.connect(url)
    began = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(connections)))
    await until_drained(watcher, "select exists (select from bare_jobs where state < 2)")
    seconds = time.perf_counter() - began
    await watcher.close()
    return seconds


async def drain_one(url: str, n: int) -> float:
    """One job a statement, 16 connections."""
    del n
    return await _drain(url, batch=1, connections=16)


async def drain_hundred(url: str, n: int) -> float:
    """A hundred jobs a statement, two connections."""
    del n
    return await _drain(url, batch=100, connections=2)
