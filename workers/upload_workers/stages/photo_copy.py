"""`uploaded` -> `extracting`: where the project drops the place where photos were taken, a copy without it is made.

The copy stands beside the original, under a key that no upload URL was given for, and is handed out in its place. Once
the row names it, the original goes (`photo_extract`): a crash in between leaves both, and the same step makes the same
copy again.
"""

from __future__ import annotations

from functools import partial

from upload_pipeline.database.photo_facts import commit_photo_copy
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.storage.photo_keys import shared_key
from upload_workers.stages.photo_source import local_object, photo_of, reader_of, store_beside
from upload_workers.steps import Advance, Commit, Outcome, StepContext


async def photo_copy(job: ClaimedJob, context: StepContext) -> Outcome:
    """Goes on at once where the original is handed out, or where there is a copy already."""
    photo = await photo_of(job, context)
    if not photo.drop_gps or photo.shared_key is not None:
        return Advance()
    key = shared_key(photo.raw_key)
    async with local_object(photo.raw_key, context) as (original, _):
        copy = original.with_name("copy")
        await reader_of(context).write_without_place(original, photo.media_type, copy)
        await store_beside(photo, key, context.store.put_file(key, copy), context)
    return Commit(partial(commit_photo_copy, shared_key=key))
