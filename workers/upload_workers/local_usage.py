"""Usage of local providers, which cost nothing: recorded where the setting `RECORD_LOCAL_USAGE` asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.database.usage import Usage, record_usage
from upload_pipeline.prices import LOCAL
from upload_workers.steps import StepContext

if TYPE_CHECKING:
    from upload_pipeline.providers.embedding import EmbeddingModel


async def note_local_parse(job: ClaimedJob, context: StepContext, *, pages: int) -> None:
    """Records one parse, where it was a local one and that is asked for."""
    if context.settings.record_local_usage and context.parser.name == LOCAL:
        used = Usage(uuid4(), LOCAL, context.parser.version, "parse", job_id=job.job_id, requests=1, pages=pages)
        await record_usage(context.db, [used], context.settings.prices)


async def note_local_embedding(job: ClaimedJob, context: StepContext, model: EmbeddingModel, *, requests: int) -> None:
    """Records one document's calls of an embedder, where it is a local one and that is asked for."""
    if requests and context.settings.record_local_usage and model.provider == LOCAL:
        used = Usage(uuid4(), LOCAL, model.name, "embed", job_id=job.job_id, requests=requests)
        await record_usage(context.db, [used], context.settings.prices)
