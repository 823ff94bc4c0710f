"""`parsing` -> `parsed`: the parser's output is stored as it came, so that one parse is never needed twice."""

from __future__ import annotations

from functools import partial

from upload_pipeline.database.documents import commit_parse
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.storage.keys import parser_output_key, uploader_of
from upload_workers.local_usage import note_local_parse
from upload_workers.stages.source import document_of, local_copy, store_text
from upload_workers.steps import Commit, Outcome, StepContext


async def parse(job: ClaimedJob, context: StepContext) -> Outcome:
    """Runs the parser over a local copy; pages of the output are separated by form feeds."""
    document = await document_of(job, context)
    async with local_copy(document, context) as path:
        parsed = await context.parser.parse(path, document.media_type)
    await note_local_parse(job, context, pages=parsed.page_count or 0)
    key = parser_output_key(uploader_of(document.raw_key), document.document_id)
    await store_text(document, key, parsed.markdown.encode("utf-8", "replace"), context)
    return Commit(
        partial(
            commit_parse,
            parser=context.parser.version,
            page_count=parsed.page_count,
            warnings=parsed.warnings,
        )
    )
