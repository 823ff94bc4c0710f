"""Every object that a photo has."""

from __future__ import annotations

from upload_pipeline.storage.photo_keys import photo_keys
from upload_pipeline.storage.store import ObjectStore


async def remove_photo_objects(store: ObjectStore, raw_key: str) -> None:
    """Removes a photo's bytes, its thumbnail and the copy that is handed out; missing ones are fine.

    Raises:
        PipelineError: `INVALID_KEY` for a raw key that is none; and as the store does.
    """
    await store.delete(list(photo_keys(raw_key)))
