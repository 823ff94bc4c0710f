"""`extracting` -> `extracted`: the photo is decoded, its EXIF read, its thumbnail stored.

What is read is what is handed out: of a photo that tells no place, the copy.
"""

from __future__ import annotations

from functools import partial

from upload_pipeline.database.photo_facts import commit_photo_facts
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.storage.photo_keys import thumbnail_key
from upload_workers.stages.photo_source import local_object, photo_of, reader_of, store_beside
from upload_workers.steps import Commit, Outcome, StepContext


async def photo_extract(job: ClaimedJob, context: StepContext) -> Outcome:
    """The same bytes give the same row and the same thumbnail."""
    photo = await photo_of(job, context)
    if photo.shared_key is not None:
        # The row names the copy, for good: nobody needs the original any more, and it tells where it was taken.
        await context.store.delete([photo.raw_key])
    async with local_object(photo.shared_key or photo.raw_key, context) as (path, stored):
        facts = await reader_of(context).read(path, photo.media_type)
    key = thumbnail_key(photo.raw_key)
    await store_beside(photo, key, context.store.put_bytes(key, facts.thumbnail), context)
    return Commit(
        partial(
            commit_photo_facts,
            width=facts.width,
            height=facts.height,
            exif=facts.exif,
            warnings=facts.warnings,
            thumbnail_key=key,
            file_bytes=stored.size,
            file_sha256=stored.sha256,
        )
    )
