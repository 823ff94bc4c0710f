"""Kills workers at random while they work, and compares what comes out with an undisturbed run.

As a test it is short. For longer, by name:

    .venv/bin/python -m tests.chaos.crash_run --documents 600 --workers 4 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from tests.scenarios.world import World, live_jobs, spread_over_users, write_documents
from upload_pipeline.database.embedded import ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations

QUICK_LEASES = {
    "UPLOAD_PIPELINE_LEASE_TTL": "2",
    "UPLOAD_PIPELINE_HEARTBEAT_INTERVAL": "0.5",
    "UPLOAD_PIPELINE_LOG_LEVEL": "warning",
}

_RETRY_GIVEN_UP = """
select count(r.job_id)
  from upload_pipeline.upload_jobs j
  join upload_pipeline.job_outcomes o on o.job_id = j.job_id and o.error_code = 'WORKER_LOST'
 cross join lateral upload_pipeline.retry_job(j.job_id) r
 where j.state = 'deadletter'
"""


@dataclass(frozen=True)
class CrashReport:
    """What a crash run did and what came of it.

    Attributes:
        reaped: leases that ran out because their worker was dead.
        given_up: jobs that lost so many workers that they ended as dead letters, and were retried after the storm.
        states: jobs by the state that they ended in.
        differences: tables whose rows differ from the undisturbed run's.
    """

    kills: int
    reaped: int
    given_up: int
    states: dict[str, int]
    differences: list[str]


async def crash_run(
    calm: World, stormy: World, *, documents: int, workers: int, seed: int, seconds: float, interval: float = 1.0
) -> CrashReport:
    """Takes the same documents through both worlds, killing a random worker every `interval` s in the stormy one.

    Raises:
        TimeoutError: a world does not come to rest within `seconds`.
    """
    choose = random.Random(seed)
    for world in (calm, stormy):
        files = write_documents(world.home / "files", documents)
        await world.ingest(spread_over_users(files, users=max(4, documents // 10)))

    calm.start_worker()
    calm_states = await calm.until_ended(seconds)
    calm.kill_all()

    admin = await asyncpg.connect(stormy.admin_url)
    # Back-off is shortened, so that the run is about crashes and not about waiting.
    name = await admin.fetchval("select current_database()")
    await admin.execute(f"""alter database "{name}" set upload_pipeline.backoff_base = '200 milliseconds'""")
    running = [stormy.start_worker() for _ in range(workers)]
    kills = 0
    async with asyncio.timeout(seconds):
        while await live_jobs(admin):
            await asyncio.sleep(interval)
            victim = choose.randrange(workers)
            running[victim].send_signal(signal.SIGKILL)
            running[victim].wait()
            running[victim] = stormy.start_worker()
            kills += 1
    given_up = await admin.fetchval(_RETRY_GIVEN_UP)
    states = await stormy.until_ended(seconds)
    stormy.kill_all()
    reaped = await admin.fetchval("select count(*) from upload_pipeline.events where code = 'job_reaped'")
    await admin.close()

    expected, found = await calm.results(), await stormy.results()
    differences = [table for table, rows in expected.items() if rows != found[table]]
    if calm_states != states:
        differences.append("job states")
    return CrashReport(kills, reaped, given_up, states, differences)


def main() -> None:
    """Runs it by name, on an embedded database of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-run-") as folder:
        home = Path(folder)
        embedded = ensure_embedded(home)
        try:
            worlds = [asyncio.run(_world(embedded, home / name, name)) for name in ("calm", "stormy")]
            for world in worlds:
                apply_migrations(world.admin_url)
            report = asyncio.run(
                crash_run(
                    *worlds,
                    documents=options.documents,
                    workers=options.workers,
                    seed=options.seed,
                    seconds=options.seconds,
                )
            )
        finally:
            stop_embedded(home)
    print(report)
    raise SystemExit(1 if report.differences else 0)


async def _world(embedded, home: Path, name: str) -> World:  # type: ignore[no-untyped-def]
    home.mkdir()
    connection = await asyncpg.connect(embedded.admin_url)
    await connection.execute(f'create database "{name}"')
    await connection.close()
    return World(embedded.url("postgres", name), embedded.url("upload_worker", name), home, dict(QUICK_LEASES))


if __name__ == "__main__":
    main()
