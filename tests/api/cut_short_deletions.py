"""Deletions that a killed service cuts short between objects and rows, and the maintenance that ends them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import asyncpg
import httpx
import pytest
from postgres_servers import Database

from tests.api.live_service import LiveService
from tests.scenarios.service_process import service_process


async def delete_and_be_killed(
    service: LiveService, admin: asyncpg.Connection, database: Database, *, user: UUID, path: str, row: str, verb: str
) -> None:
    """Has a service process delete something for a user, and kills it when it has come to the rows.

    Args:
        path: of the route.
        row: where the row is, as `upload_pipeline.photos where photo_id = '…'`.
        verb: that removes it.
    """
    waiting = f"""
        from pg_stat_activity
        where query like '%{verb}%' and wait_event_type = 'Lock' and datname = current_database()
        """
    holding = await asyncpg.connect(database.admin_url)
    held = holding.transaction()
    await held.start()
    # Hiding it does not wait for this lock; removing its row does.
    await holding.execute(f"select from {row} for key share")
    try:
        with pytest.raises(AssertionError, match="the service ended with -9"):
            await _kill_a_service_that_deletes(service, admin, database, user, path, waiting)
        # Its statement, which waits for the lock, dies with it: else the server would go on with it by itself.
        assert await admin.fetch(f"select pg_terminate_backend(pid) {waiting}")
    finally:
        await held.rollback()
        await holding.close()


async def _kill_a_service_that_deletes(
    service: LiveService, admin: asyncpg.Connection, database: Database, user: UUID, path: str, waiting: str
) -> None:
    headers = {"Authorization": service.client(user).headers["Authorization"]}
    with service_process(database.worker_url, service.settings.home, lock_timeout="60") as other:
        async with httpx.AsyncClient(base_url=other.url, headers=headers) as client:
            asking = asyncio.create_task(client.delete(path))
            async with asyncio.timeout(50):
                while not await admin.fetch(f"select pid {waiting}"):
                    await asyncio.sleep(0.01)
            other.process.kill()
            other.process.wait()
            with pytest.raises(httpx.TransportError):
                await asking


async def maintenance(service: LiveService, database: Database) -> int:
    """Runs the command; how many deletions it finished."""
    command = [str(Path(sys.executable).parent / "upload-pipeline"), "maintenance", "--json"]
    environment = {
        **os.environ,
        "UPLOAD_PIPELINE_HOME": str(service.settings.home),
        "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url,
    }
    ended = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    finished: int = json.loads(ended.stdout)["deletions_finished"]
    return finished
