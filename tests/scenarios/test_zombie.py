"""A worker that stops for longer than its lease and then goes on has lost its jobs, and changes nothing."""

from __future__ import annotations

import asyncio
import signal

import asyncpg

from tests.scenarios.world import World, spread_over_users, write_documents


async def test_a_worker_that_slept_past_its_lease_changes_nothing(world: World) -> None:
    files = write_documents(world.home / "files", 24)
    await world.ingest(spread_over_users(files, users=12))
    admin = await asyncpg.connect(world.admin_url)
    zombie = world.start_worker()

    # Stopped in the very middle of work: while it holds leases.
    async with asyncio.timeout(30):
        while not await held_by(admin, zombie.pid):
            await asyncio.sleep(0.005)
    zombie.send_signal(signal.SIGSTOP)
    held = await held_by(admin, zombie.pid)
    assert held, "it was stopped with work in its hands"

    world.start_worker()
    states = await world.until_ended(60)
    assert states == {"done": len(files)}
    reaped = await admin.fetchval("select count(*) from upload_pipeline.events where code = 'job_reaped'")
    assert reaped >= 1, "its leases ran out and were taken back"
    results = await world.results()
    tokens = await lease_tokens(admin)

    zombie.send_signal(signal.SIGCONT)
    await asyncio.sleep(2)

    assert await world.results() == results
    assert await lease_tokens(admin) == tokens
    assert await world.until_ended(5) == states
    if zombie.poll() is None:
        # It lives: then it takes other work, and ends politely.
        more = write_documents(world.home / "more", 4, first_seed=100)
        world.workers[-1].kill()
        await world.ingest(spread_over_users(more, users=4))
        assert await world.until_ended(60) == {"done": len(files) + len(more)}
        zombie.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(zombie.wait, 20) == 0
    await admin.close()


async def held_by(connection: asyncpg.Connection, pid: int) -> int:
    """How many jobs a worker process holds."""
    count: int = await connection.fetchval(
        """
        select count(*) from upload_pipeline.upload_jobs j join upload_pipeline.workers w using (worker_id)
         where j.state = 'working' and w.pid = $1
        """,
        pid,
    )
    return count


async def lease_tokens(connection: asyncpg.Connection) -> list[tuple[object, ...]]:
    """Each job's token and place."""
    rows = await connection.fetch(
        "select job_id, lease_token, stage, state, retry_count, finished_at from upload_pipeline.upload_jobs order by 1"
    )
    return [tuple(row) for row in rows]
