"""A process that leads a photo's job step by step, as a worker does, and stops for ever at one of the steps' writes.

    python killable_photo_worker.py shared|thumbnail|delete|commit_photo_copy|commit_photo_facts

Told the rest by its settings. It says so once the write of the store is done, or the commit is about to be.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from upload_pipeline.database import queue
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.providers.local_photo_reader import LocalPhotoReader
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.objects import StoredObject
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_workers.stages.photo_check import photo_check
from upload_workers.stages.photo_copy import photo_copy
from upload_workers.stages.photo_extract import photo_extract
from upload_workers.steps import Commit, StepContext

WRITE = sys.argv[1]
TTL = timedelta(seconds=60)


async def stop_for_ever() -> None:
    print(WRITE, flush=True)
    await asyncio.Event().wait()


class StoppingStore:
    """The store, which does not come back from the write in question."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def put_file(self, key: str, path: Path) -> StoredObject:
        return await self._stored(await self._store.put_file(key, path))

    async def put_bytes(self, key: str, data: bytes) -> StoredObject:
        return await self._stored(await self._store.put_bytes(key, data))

    async def delete(self, keys: Iterable[str]) -> None:
        await self._store.delete(keys)
        if WRITE == "delete":
            await stop_for_ever()

    async def _stored(self, stored: StoredObject) -> StoredObject:
        if f".{WRITE}." in stored.key:
            await stop_for_ever()
        return stored


async def main() -> None:
    settings = load_settings()
    url = settings.database_url.get_secret_value()
    db = await open_pool(url, connection_options(settings), size=2)
    store = StoppingStore(open_store(settings.effective_storage_url))
    reader = LocalPhotoReader(30.0, 512 * 1024**2, 20_000_000)
    context = StepContext(db, store, None, None, settings, settings.home / "scratch", photos=reader)  # type: ignore[arg-type]
    (job,) = await queue.claim_jobs(db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL)
    stage, following = "pending_upload", {"pending_upload": "uploaded", "uploaded": "extracting"}
    for step in (photo_check, photo_copy, photo_extract):
        outcome = await step(job, context)
        if isinstance(outcome, Commit):
            if outcome.verb.func.__name__ == WRITE:  # type: ignore[attr-defined]
                await stop_for_ever()
            moved = await outcome.verb(db, job.lease, keep=True, ttl=TTL)
        else:
            asked = queue.Advance(job.lease, stage, following[stage], True)
            moved = (await queue.advance_jobs(db, [asked], ttl=TTL))[job.job_id]
        stage = moved.stage


if __name__ == "__main__":
    asyncio.run(main())
