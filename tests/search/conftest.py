"""A database, an embedder, and a library to search."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.search.library import Library
from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.search.query_models import QueryModels
from upload_pipeline.settings import load_settings

__all__ = ["Library"]


@pytest.fixture
def user() -> UUID:
    return uuid4()


@pytest.fixture
async def db(database: Any) -> AsyncIterator[BoundedPool]:
    pool = await open_pool(database.worker_url, size=4)
    yield pool
    await pool.close()


@pytest.fixture
async def embedder() -> AsyncIterator[LocalEmbedder]:
    opened = LocalEmbedder()
    yield opened
    await opened.close()


@pytest.fixture
async def models(db: BoundedPool, tmp_path: Path) -> AsyncIterator[QueryModels]:
    opened = QueryModels(db, ProviderCalls(), load_settings(home=tmp_path))
    yield opened
    await opened.close()


@pytest.fixture
def library(admin: asyncpg.Connection, embedder: LocalEmbedder) -> Library:
    return Library(admin, embedder)
