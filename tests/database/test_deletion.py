"""Deleting documents: rows and objects, whole or to be finished, and one failure holds up no other."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from upload_pipeline.database import documents
from upload_pipeline.database.deletion import delete_document, finish_deletions
from upload_pipeline.database.documents import DeletedDocument
from upload_pipeline.errors import ErrorCode, PipelineError


@pytest.fixture
async def db(database: Any) -> Any:
    connection = await asyncpg.connect(database.worker_url)
    yield connection
    await connection.close()


async def accept(db: asyncpg.Connection) -> UUID:
    document, user = uuid4(), uuid4()
    await documents.accept_document(
        db,
        document_id=document,
        user_id=user,
        filename="policy.pdf",
        media_type="application/pdf",
        file_bytes=1,
        file_sha256=sha256(document.bytes).hexdigest(),
        raw_key=f"raw/{user}/{document}",
        metadata={},
    )
    return document


class Objects:
    """Takes note of whose objects are removed; fails for those in `stuck`."""

    def __init__(self, *stuck: UUID) -> None:
        self.stuck = set(stuck)
        self.removed: list[UUID] = []

    async def remove(self, deleted: DeletedDocument) -> None:
        if deleted.document_id in self.stuck:
            raise PipelineError(ErrorCode.STORAGE_UNAVAILABLE, "the store does not answer")
        self.removed.append(deleted.document_id)


async def count(db: asyncpg.Connection) -> int:
    rows: int = await db.fetchval("select count(*) from upload_pipeline.documents")
    return rows


async def test_a_document_goes_with_its_objects_and_once_more_is_no_error(db: asyncpg.Connection) -> None:
    document, objects = await accept(db), Objects()
    assert await delete_document(db, document, objects.remove)
    assert objects.removed == [document]
    assert await count(db) == 0
    assert not await delete_document(db, document, objects.remove)


async def test_a_store_that_fails_leaves_the_document_hidden_until_maintenance_ends_it(
    db: asyncpg.Connection,
) -> None:
    document = await accept(db)
    with pytest.raises(PipelineError, match="does not answer"):
        await delete_document(db, document, Objects(document).remove)
    assert await db.fetchval("select deleted_at is not null from upload_pipeline.documents")
    assert await db.fetchval("select state from upload_pipeline.upload_jobs") == "cancelled"

    assert await finish_deletions(db, before=in_an_hour(), remove_objects=Objects().remove) == 1
    assert await count(db) == 0


async def test_one_deletion_that_fails_holds_up_no_other(db: asyncpg.Connection) -> None:
    stuck, others = await accept(db), [await accept(db) for _ in range(3)]
    for document in (stuck, *others):
        await documents.begin_deletion(db, document)
    objects = Objects(stuck)
    with pytest.raises(PipelineError, match="does not answer"):
        await finish_deletions(db, before=in_an_hour(), remove_objects=objects.remove)
    assert set(objects.removed) == set(others)
    assert await db.fetchval("select document_id from upload_pipeline.documents") == stuck


def in_an_hour() -> datetime:
    return datetime.now(UTC) + timedelta(hours=1)
