"""Documents at the beginning of their way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from document_line import TYPES, USER, Line, OpenLine
from sample_documents import Kind, make_document

from upload_pipeline.database import documents
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.ids import document_id as document_id_of
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.store import open_store
from upload_workers.models_in_use import ModelsInUse
from upload_workers.steps import StepContext


@pytest.fixture(scope="module")
def parser() -> Any:
    parser = LocalParser(60.0, 1024**3)
    yield parser
    parser.close()


@pytest.fixture
async def open_line(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, parser: LocalParser
) -> AsyncIterator[OpenLine]:
    """Puts a document's bytes in the store and its job in the queue."""
    settings = load_settings(home=tmp_path, database_url=database.worker_url, embed_batch_size=2)
    pool = await open_pool(database.worker_url, connection_options(settings), size=3)
    store = open_store(settings.effective_storage_url)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    models = ModelsInUse(pool, ProviderCalls(), settings)
    await models.start()

    async def begin(kind: Kind, data: bytes | None = None) -> Line:
        data = make_document(kind, seed=7, pages=4) if data is None else data
        digest = sha256(data).hexdigest()
        document = document_id_of(USER, digest)
        key = raw_key(USER, document)
        await store.put_bytes(key, data)
        await documents.accept_document(
            pool,
            document_id=document,
            user_id=USER,
            filename=f"claim.{kind}",
            media_type=TYPES[kind],
            file_bytes=len(data),
            file_sha256=digest,
            raw_key=key,
            metadata={},
        )
        return Line(StepContext(pool, store, parser, models, settings, scratch), admin, document)

    yield begin
    await models.close()
    await pool.close()


@pytest.fixture
async def undisturbed(open_line: OpenLine) -> Any:
    """The rows of each kind of document that nothing happened to."""

    async def rows_of(kind: Kind) -> dict[str, list[dict[str, Any]]]:
        line = await open_line(kind)
        await line.run_to(await line.claim(), "embedded")
        rows = await line.rows()
        assert rows["chunks"]
        assert rows["documents"][0]["searchable"]
        assert all(rows[name][0]["count"] == 0 for name in ("chunk buffer", "vector buffer", "cached chunks"))
        # from the start again, with nothing left of it
        await documents.begin_deletion(line.context.db, line.document)
        await documents.finish_deletion(line.context.db, line.document)
        return rows

    return rows_of
