"""The probe pipeline's world, and a proxy that can go silent, for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from probe_world import ProbeWorld
from silent_proxy import SilentProxy

from upload_pipeline.database import connection
from upload_workers import upkeep


@pytest.fixture
async def world(database: Any, admin: asyncpg.Connection, tmp_path: Path) -> ProbeWorld:
    """A database with the probe pipeline and no job."""
    world = ProbeWorld(admin, database.worker_url, tmp_path)
    await world.make_pipeline()
    return world


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens what settings do not, for workers in this process."""
    monkeypatch.setattr(upkeep, "PROMOTE_INTERVAL", 0.1)
    monkeypatch.setattr(connection, "_COMMAND_SLACK", 0.2)


@pytest.fixture
def proxy(database: Any) -> Iterator[SilentProxy]:
    """Stands between a worker and the test's database."""
    with SilentProxy(database.worker_url) as proxy:
        yield proxy
