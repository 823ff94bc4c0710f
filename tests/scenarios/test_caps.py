"""Sixteen workers keep every user's cap."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from uuid import UUID, uuid4

import asyncpg

from tests.scenarios.world import World
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.settings import load_settings
from upload_workers.process import running_worker
from upload_workers.steps import Advance, Outcome, StepContext

CAP = 2
WORKERS = 16


async def short_work(job: ClaimedJob, context: StepContext) -> Outcome:
    """Takes long enough for others to claim meanwhile."""
    del job, context
    await asyncio.sleep(0.01)
    return Advance()


async def test_sixteen_workers_never_pass_the_cap_of_a_user(world: World) -> None:
    admin = await asyncpg.connect(world.admin_url)
    users = [uuid4() for _ in range(5)]
    documents = await documents_of(admin, users, 60)
    settings = load_settings(
        home=world.home, database_url=world.worker_url, pool_size=2, poll_min=0.01, poll_max=0.05, log_level="error"
    )
    samples: list[int] = []
    async with AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(
                running_worker(
                    settings, world.worker_url, pools=["caps"], concurrency=4, steps={("caps", "todo"): short_work}
                )
            )
        await admin.fetch("select * from upload_pipeline.enqueue_jobs($1, $2, 'caps')", *documents)
        async with asyncio.timeout(60):
            while await admin.fetchval("select count(*) from upload_pipeline.upload_jobs where state <> 'done'"):
                most = await admin.fetchval(
                    "select max(n) from (select count(*) as n from upload_pipeline.upload_jobs"
                    " where state = 'working' group by user_id) counted"
                )
                samples.append(most or 0)
    await admin.close()
    assert max(samples) == CAP, "the cap is reached and never passed"
    assert len(samples) >= 20


async def documents_of(
    connection: asyncpg.Connection, users: Sequence[UUID], each: int
) -> tuple[list[UUID], list[UUID]]:
    """Makes documents, so many for each user; returns their ids and owners."""
    await connection.execute(
        "insert into upload_pipeline.stages values ('caps', 'todo', 0, 0, 'caps', false), "
        "('caps', 'finished', 1, 100, 'caps', true) on conflict do nothing"
    )
    rows = await connection.fetch(
        """
        insert into upload_pipeline.documents
          (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
        select d.id, d.user_id, 'x', 'text/plain', 1, encode(sha256(d.id::text::bytea), 'hex'), d.id::text
          from (select gen_random_uuid() as id, user_id from unnest($1::uuid[]) user_id, generate_series(1, $2::int)) d
        returning document_id, user_id
        """,
        list(users),
        each,
    )
    return [row["document_id"] for row in rows], [row["user_id"] for row in rows]
