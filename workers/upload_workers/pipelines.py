"""Which step leaves which stage. Adding a stage: a row in `upload_pipeline.stages`, a module, a line here."""

from __future__ import annotations

from collections.abc import Mapping

from upload_pipeline.stages import (
    DOCUMENT_PIPELINE,
    PHOTO_PIPELINE,
    REEMBED_PIPELINE,
    PhotoStage,
    ReembedStage,
    Stage,
)
from upload_workers.stages.check_markdown import check_markdown
from upload_workers.stages.chunk import chunk
from upload_workers.stages.embed import embed
from upload_workers.stages.open_step import open_step
from upload_workers.stages.parse import parse
from upload_workers.stages.photo_check import photo_check
from upload_workers.stages.photo_copy import photo_copy
from upload_workers.stages.photo_detect import photo_detect
from upload_workers.stages.photo_extract import photo_extract
from upload_workers.stages.publish import publish
from upload_workers.stages.refill import refill
from upload_workers.stages.store_chunks import store_chunks
from upload_workers.stages.submit import submit
from upload_workers.stages.validate import validate
from upload_workers.steps import Step

STEPS: Mapping[tuple[str, str], Step] = {
    (DOCUMENT_PIPELINE, Stage.QUEUED): validate,
    (DOCUMENT_PIPELINE, Stage.JOB_VALIDATED): submit,
    (DOCUMENT_PIPELINE, Stage.PARSING): parse,
    (DOCUMENT_PIPELINE, Stage.PARSED): check_markdown,
    (DOCUMENT_PIPELINE, Stage.PARSE_VALIDATED): open_step,
    (DOCUMENT_PIPELINE, Stage.CHUNKING): chunk,
    (DOCUMENT_PIPELINE, Stage.CHUNKS_BUFFERED): store_chunks,
    (DOCUMENT_PIPELINE, Stage.CHUNKED): open_step,
    (DOCUMENT_PIPELINE, Stage.EMBEDDING): embed,
    (DOCUMENT_PIPELINE, Stage.EMBEDDINGS_BUFFERED): publish,
    (PHOTO_PIPELINE, PhotoStage.PENDING_UPLOAD): photo_check,
    (PHOTO_PIPELINE, PhotoStage.UPLOADED): photo_copy,
    (PHOTO_PIPELINE, PhotoStage.EXTRACTING): photo_extract,
    (PHOTO_PIPELINE, PhotoStage.EXTRACTED): open_step,
    (PHOTO_PIPELINE, PhotoStage.DETECTING): photo_detect,
    (REEMBED_PIPELINE, ReembedStage.QUEUED): refill,
}
