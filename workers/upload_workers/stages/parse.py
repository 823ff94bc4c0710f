"""`parsing` -> `parsed`: the parser's output is stored as it came, so that one parse is never needed twice.

What was submitted to a hosted parser is asked for there, whatever the setting says by now: the document's row decides.
"""

from __future__ import annotations

from functools import partial

from upload_pipeline.database.documents import commit_parse
from upload_pipeline.database.queue import ClaimedJob
from upload_workers.local_usage import note_local_parse
from upload_workers.stages.follow_parse import follow_parse
from upload_workers.stages.source import document_of, local_copy, output_key, store_text
from upload_workers.steps import Commit, Outcome, StepContext


async def parse(job: ClaimedJob, context: StepContext) -> Outcome:
    """Runs the parser over a local copy, or asks the hosted one; pages of the output are separated by form feeds."""
    document = await document_of(job, context)
    if document.parse_id is not None:
        return await follow_parse(job, document, document.parse_id, context)
    async with local_copy(document, context) as path:
        parsed = await context.parser.parse(path, document.media_type)
    await note_local_parse(job, context, pages=parsed.page_count or 0)
    await store_text(document, output_key(document), parsed.markdown.encode("utf-8", "replace"), context)
    return Commit(
        partial(
            commit_parse,
            parser=context.parser.version,
            page_count=parsed.page_count,
            warnings=parsed.warnings,
        )
    )
