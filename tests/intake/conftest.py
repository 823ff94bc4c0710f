"""An intake with a real database, a real local store and the real parser, and ways to see what it left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from announced import reserve

from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.intake.staging import Intake
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.storage.store import ObjectStore, open_store

MAX_BYTES = 200_000


@dataclass(frozen=True)
class Traces:
    """What a user's intakes have left."""

    user_id: UUID
    store: ObjectStore
    db: BoundedPool

    async def keys(self) -> set[str]:
        return {info.key async for info in self.store.list()}

    async def documents(self) -> list[UUID]:
        rows = await self.db.fetch("select document_id from upload_pipeline.documents where user_id = $1", self.user_id)
        return [row["document_id"] for row in rows]

    async def jobs(self) -> int:
        count: int = await self.db.fetchval(
            "select count(*) from upload_pipeline.upload_jobs where user_id = $1", self.user_id
        )
        return count

    async def nothing(self) -> bool:
        return (await self.keys(), await self.documents(), await self.jobs()) == (set(), [], 0)


@pytest.fixture
def user() -> UUID:
    return uuid4()


@pytest.fixture
async def db(database: Any) -> AsyncIterator[BoundedPool]:
    pool = await open_pool(database.worker_url, size=4)
    yield pool
    await pool.close()


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(f"file://{tmp_path / 'objects'}")


@pytest.fixture
def traces(user: UUID, store: ObjectStore, db: BoundedPool) -> Traces:
    return Traces(user, store, db)


@pytest.fixture
def parser() -> Iterator[LocalParser]:
    opened = LocalParser(timeout=30.0, memory_bytes=1024**3)
    yield opened
    opened.close()


@pytest.fixture
def intake(db: BoundedPool, store: ObjectStore, parser: LocalParser, tmp_path: Path) -> Intake:
    return Intake(db, store, parser.inspect, MAX_BYTES, tmp_path / "scratch", retry_seconds=0.0)


@pytest.fixture
async def reserved(intake, user):
    return await reserve(intake, user)
