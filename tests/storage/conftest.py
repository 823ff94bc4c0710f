from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore
from s3_servers import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

from tests.simulators.object_server import Bucket
from tests.simulators.supabase_storage import SupabaseStorage
from tests.simulators.supabase_wire import PUBLISHABLE_KEY
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.store import ObjectStore, open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def local(root: Path) -> ObjectStore:
    return open_store(f"file://{root}")


@pytest.fixture
async def supabase(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SupabaseStorage]:
    """Supabase Storage with the bucket `files`; this process has its S3 keys."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY_ID),
        ("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY),
        ("AWS_REGION", REGION),
    ):
        monkeypatch.setenv(name, value)
    async with SupabaseStorage(buckets={"files": Bucket()}) as server:
        yield server


@pytest.fixture
async def supabase_store(supabase: SupabaseStorage) -> AsyncIterator[ObjectStore]:
    """A store in a folder of its bucket."""
    address = supabase.url.replace("http://", "supabase+http://")
    store = open_store(f"{address}/files/some/prefix", publishable_key=PUBLISHABLE_KEY)
    yield store
    await store.close()


@pytest.fixture(params=["local", "s3", "supabase", "obstore-memory", "obstore-directory"])
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
        case "supabase":
            return request.getfixturevalue("supabase_store")
        case "obstore-memory":
            return ObjectStore(ObstoreBackend(MemoryStore()))
        case _:
            return ObjectStore(ObstoreBackend(LocalStore(root, mkdir=True)))
