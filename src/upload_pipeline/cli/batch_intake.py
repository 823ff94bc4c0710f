"""The intake of `ingest --metadata FILE`: all files together, as one batch with its mapping."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.batch import BatchTerms, accept_batch, incoming_batch
from upload_pipeline.intake.batch_files import MAX_FILES, too_many_files

if TYPE_CHECKING:
    from upload_pipeline.cli.ingestion import Ingestion, Request
    from upload_pipeline.intake.staging import Intake
    from upload_pipeline.settings import Settings


async def take_batch(intake: Intake, settings: Settings, request: Request, run: Ingestion, correlation_id: str) -> None:
    """Takes all files of a run in as one batch.

    Raises:
        PipelineError: `BATCH_TOO_LARGE`, `INVALID_MAPPING`, and as `accept_batch` does; then no file is taken.
    """
    if len(run.files) > MAX_FILES:
        raise too_many_files(len(run.files))
    mapping = None
    if request.mapping is not None:
        mapping = await asyncio.to_thread(_read, request.mapping, settings.max_mapping_bytes)
    batch_id = uuid4()
    async with incoming_batch(intake, user_id=request.user_id, correlation_id=correlation_id) as files:
        for file in run.files:
            file.begun = time.monotonic()
            file.state = "intake"
            await files.add_path(file.path)
        terms = BatchTerms(
            mapping,
            settings.max_mapping_bytes,
            required=settings.batch_required_fields,
            common=request.metadata,
        )
        members = await accept_batch(files, batch_id, terms)
    for file, member in zip(run.files, members, strict=True):
        file.document_id, file.job_id, file.duplicate = member.document_id, member.job_id, member.duplicate
        file.batch_id = run.batch_id = batch_id
        if member.error_code is not None or member.job_id is None:
            file.code, file.message, file.state = member.error_code, member.error_message, "refused"
        else:
            file.state = "queued"
            run.by_job.setdefault(member.job_id, []).append(file)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise PipelineError(
            ErrorCode.FILE_UNREADABLE,
            f"The metadata mapping {str(path)!r} cannot be read: {error.strerror}. Check its path and permissions.",
            {"path": str(path)},
        ) from error
