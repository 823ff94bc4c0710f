"""`parsed` -> `parse_validated`: the Markdown is normalised, checked for text and named by its sha256."""

from __future__ import annotations

import asyncio
from functools import partial
from hashlib import sha256

from upload_pipeline.database.documents import commit_markdown
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.storage.keys import markdown_key, uploader_of
from upload_pipeline.text.normalise import NormalisedMarkdown, check_text, normalise_markdown
from upload_workers.stages.source import MARKDOWN_LIMIT, document_of, output_key, store_text
from upload_workers.steps import Commit, Outcome, StepContext


async def check_markdown(job: ClaimedJob, context: StepContext) -> Outcome:
    """Stores the text that chunks are cut from; refuses a text that is empty or garbage (`PARSE_EMPTY`)."""
    document = await document_of(job, context)
    uploader = uploader_of(document.raw_key)
    raw = await context.store.get_text(output_key(document), MARKDOWN_LIMIT)

    def normalise() -> tuple[NormalisedMarkdown, bytes]:
        normalised = normalise_markdown(raw, paged=document.page_count is not None)
        check_text(normalised.text, document.page_count)
        return normalised, normalised.text.encode()

    normalised, encoded = await asyncio.to_thread(normalise)
    digest = sha256(encoded).hexdigest()
    key = markdown_key(uploader, document.document_id, digest)
    await store_text(document, key, encoded, context)
    return Commit(
        partial(
            commit_markdown,
            key=key,
            sha256=digest,
            chars=len(normalised.text),
            page_starts=normalised.page_starts,
        )
    )
