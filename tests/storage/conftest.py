from __future__ import annotations

from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.store import ObjectStore, open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def local(root: Path) -> ObjectStore:
    return open_store(f"file://{root}")


@pytest.fixture(params=["local", "s3", "obstore-memory", "obstore-directory"])
def store(request: pytest.FixtureRequest, root: Path) -> ObjectStore:
    """Every way to keep objects.

    obstore's own stores stand for those that differ from S3: its directory one, like GCS and Azure, calls deleting
    what is missing an error.
    """
    match request.param:
        case "local":
            return open_store(f"file://{root}")
        case "s3":
            return open_store(f"s3://{request.getfixturevalue('s3_bucket')}/some/prefix")
        case "obstore-memory":
            return ObjectStore(ObstoreBackend(MemoryStore()))
        case _:
            return ObjectStore(ObstoreBackend(LocalStore(root, mkdir=True)))
