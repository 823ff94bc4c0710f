"""Worlds for scenarios."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.api.live_service import token
from tests.scenarios.document_reader import ROOT, Reader
from tests.scenarios.paid_world import DIMENSIONS
from tests.scenarios.service_process import service_process
from tests.scenarios.world import World
from tests.simulators.openai_embeddings import KEY, OpenAISimulator
from upload_pipeline.ids import LOCAL_USER_ID

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


@pytest.fixture
def reader(database: Any, tmp_path: Path) -> Iterator[Reader]:
    """A reader of the documents, with a service and a worker."""
    world = World(database.admin_url, database.worker_url, tmp_path / "home")
    folder = tmp_path / "folder"
    shutil.copytree(ROOT / "samples", folder / "samples")
    try:
        with service_process(database.worker_url, world.home) as service:
            world.start_worker()
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = {
                **os.environ,
                "PATH": path,
                "API": service.url,
                "TOKEN": token(LOCAL_USER_ID),
                "MANAGER": token(uuid4(), app_metadata={"roles": ["FP_MANAGER"]}),
                "UPLOAD_PIPELINE_HOME": str(world.home),
                "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url,
            }
            yield Reader(environment, folder)
    finally:
        world.kill_all()


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[OpenAISimulator]:
    """The world's embedder; workers end before it does."""
    async with OpenAISimulator(requests_per_minute=100_000) as simulator:
        world.environment |= {
            "UPLOAD_PIPELINE_EMBEDDER": "openai",
            "UPLOAD_PIPELINE_OPENAI_API_KEY": KEY,
            "UPLOAD_PIPELINE_OPENAI_BASE_URL": simulator.url,
            "UPLOAD_PIPELINE_OPENAI_DIMENSIONS": str(DIMENSIONS),
            "UPLOAD_PIPELINE_OPENAI_TIMEOUT": "3",
            "UPLOAD_PIPELINE_EMBED_BATCH_SIZE": "6",
        }
        yield simulator
        world.kill_all()
