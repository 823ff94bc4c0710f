"""Batches put into a database by the verb, without a request."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from upload_pipeline.database.batches import RefusedFile, create_batch


async def add_batch(db: Any, user: UUID) -> UUID:
    """A batch with one file, which was refused."""
    batch = uuid4()
    refused = RefusedFile("empty.txt", "EMPTY_FILE", "'empty.txt' is empty.")
    await create_batch(db, batch_id=batch, user_id=user, files=[refused], warnings=[])
    return batch
