"""Every object that a document has."""

from __future__ import annotations

from uuid import UUID

from upload_pipeline.storage.keys import markdown_key, parser_output_key
from upload_pipeline.storage.store import ObjectStore


async def remove_document_objects(store: ObjectStore, *, user_id: UUID, document_id: UUID, raw_key: str) -> None:
    """Removes a document's bytes, its parser output and its markdown; missing ones are fine."""
    await store.delete([raw_key, parser_output_key(user_id, document_id), markdown_key(user_id, document_id)])
