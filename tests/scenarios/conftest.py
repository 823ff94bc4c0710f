"""Worlds for scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.world import World

SHORT_LEASES = {
    "UPLOAD_PIPELINE_LEASE_TTL": "2",
    "UPLOAD_PIPELINE_HEARTBEAT_INTERVAL": "0.5",
    "UPLOAD_PIPELINE_LOG_LEVEL": "warning",
}


@pytest.fixture
def world(database: Any, tmp_path: Path) -> Iterator[World]:
    """A database and a home; workers that the test leaves running are ended."""
    world = World(database.admin_url, database.worker_url, tmp_path, dict(SHORT_LEASES))
    yield world
    world.kill_all()
