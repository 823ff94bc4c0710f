"""The probe pipeline's world, and a proxy that can go silent, for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from probe_world import ProbeWorld
from silent_proxy import SilentProxy


@pytest.fixture
async def world(database: Any, admin: asyncpg.Connection, tmp_path: Path) -> ProbeWorld:
    """A database with the probe pipeline and no job."""
    world = ProbeWorld(admin, database.worker_url, tmp_path)
    await world.make_pipeline()
    return world


@pytest.fixture
def proxy(database: Any) -> Iterator[SilentProxy]:
    """Stands between a worker and the test's database."""
    with SilentProxy(database.worker_url) as proxy:
        yield proxy


@pytest.fixture
async def worker_log() -> AsyncIterator[list[dict[str, Any]]]:
    """What the workers of this process log during the test."""
    import structlog

    with structlog.testing.capture_logs() as lines:
        yield lines
