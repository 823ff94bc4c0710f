"""Every object that a document has."""

from __future__ import annotations

from uuid import UUID

from upload_pipeline.storage.keys import markdown_prefix, parser_output_key, uploader_of
from upload_pipeline.storage.store import ObjectStore


async def remove_document_objects(store: ObjectStore, *, document_id: UUID, raw_key: str) -> None:
    """Removes a document's bytes, its parser output and its texts; missing ones are fine.

    Raises:
        PipelineError: `INVALID_KEY` for a raw key that is none; and as the store does.
    """
    uploader = uploader_of(raw_key)
    texts = [info.key async for info in store.list(markdown_prefix(uploader, document_id))]
    await store.delete([raw_key, parser_output_key(uploader, document_id), *texts])
