from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from obstore.store import LocalStore, MemoryStore
from s3_servers import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

from tests.simulators.azure_blob import ACCOUNT, KEY, AzureBlob
from tests.simulators.gcs import GoogleStorage
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


@pytest.fixture(scope="session")
def account_key() -> rsa.RSAPrivateKey:
    """Of a service account; to make one takes a while."""
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
async def google(monkeypatch: pytest.MonkeyPatch, account_key: rsa.RSAPrivateKey) -> AsyncIterator[GoogleStorage]:
    """Google Cloud Storage with the bucket `files`; this process has its service account's key."""
    async with GoogleStorage(buckets={"files": Bucket()}, key=account_key) as server:
        monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", server.account())
        yield server


@pytest.fixture
async def azure(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AzureBlob]:
    """Azure Blob Storage with the container `files`; this process has the account's key."""
    async with AzureBlob(buckets={"files": Bucket()}) as server:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.endpoint)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        yield server


@pytest.fixture(params=["local", "s3", "supabase", "google", "azure", "obstore-memory", "obstore-directory"])
def store(request: pytest.FixtureRequest, root: Path) -> ObjectStore:
    """Every way to keep objects.

    obstore's own stores are here for its own sake: its directory one, like GCS and Azure, calls deleting what is
    missing an error.
    """
    match request.param:
        case "local":
            return open_store(f"file://{root}")
        case "s3":
            return open_store(f"s3://{request.getfixturevalue('s3_bucket')}/some/prefix")
        case "supabase":
            return request.getfixturevalue("supabase_store")
        case "google":
            request.getfixturevalue("google")
            return open_store("gs://files/some/prefix")
        case "azure":
            request.getfixturevalue("azure")
            return open_store("az://files/some/prefix")
        case "obstore-memory":
            return ObjectStore(ObstoreBackend(MemoryStore()))
        case _:
            return ObjectStore(ObstoreBackend(LocalStore(root, mkdir=True)))
