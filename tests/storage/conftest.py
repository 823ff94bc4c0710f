from __future__ import annotations

from pathlib import Path

import pytest
from obstore.store import MemoryStore

from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.store import ObjectStore, open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def local(root: Path) -> ObjectStore:
    return open_store(f"file://{root}")


@pytest.fixture(params=["local", "obstore"])
def store(request: pytest.FixtureRequest, root: Path) -> ObjectStore:
    """Both ways to keep objects; obstore's own memory store stands for those behind a network."""
    if request.param == "local":
        return open_store(f"file://{root}")
    return ObjectStore(ObstoreBackend(MemoryStore()))
