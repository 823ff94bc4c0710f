"""`queued` -> `job_validated`: the object is there, is what was uploaded, and can be read."""

from __future__ import annotations

import asyncio

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.media_types import HEAD_BYTES, detect_media_type
from upload_workers.stages.source import document_of, local_copy
from upload_workers.steps import Advance, Outcome, StepContext


async def validate(job: ClaimedJob, context: StepContext) -> Outcome:
    """Checks size, sha256, type by content, and that the parser can open the file."""
    document = await document_of(job, context)
    async with local_copy(document, context) as path:

        def read_head() -> bytes:
            with path.open("rb") as file:
                return file.read(HEAD_BYTES)

        head = await asyncio.to_thread(read_head)
        detect_media_type(document.filename, head, size=document.file_bytes)
        await context.parser.inspect(path, document.media_type)
    return Advance()
