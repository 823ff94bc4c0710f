"""The stages of the pipelines, as `upload_pipeline.stages` has them.

The database owns the rows; this module names them for code that must. A test holds the two against each
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DOCUMENT_PIPELINE = "document"
PHOTO_PIPELINE = "photo"

REEMBED_PIPELINE = "reembed"
"""Fills an embedding model with the chunks that there are; no job of it is one that a user asked for."""

BACKGROUND_POOL = "background"
"""Where such jobs wait, so that they take nothing of what users wait for."""


class Stage(StrEnum):
    """Where a document's job stands: the work named before it is done, the step that leaves it is next."""

    QUEUED = "queued"
    JOB_VALIDATED = "job_validated"
    PARSING = "parsing"
    PARSED = "parsed"
    PARSE_VALIDATED = "parse_validated"
    CHUNKING = "chunking"
    CHUNKS_BUFFERED = "chunks_buffered"
    CHUNKED = "chunked"
    EMBEDDING = "embedding"
    EMBEDDINGS_BUFFERED = "embeddings_buffered"
    EMBEDDED = "embedded"


class PhotoStage(StrEnum):
    """Where a photo's job stands: the work named before it is done, the step that leaves it is next."""

    PENDING_UPLOAD = "pending_upload"
    UPLOADED = "uploaded"
    EXTRACTING = "extracting"
    EXTRACTED = "extracted"
    DETECTING = "detecting"
    COMPLETED = "completed"


class PhotoStatus(StrEnum):
    """What everybody but the queue is told of a photo, as the function `upload_pipeline.photo_status` says it."""

    PENDING_UPLOAD = "pending_upload"
    UPLOADED = "uploaded"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


class ReembedStage(StrEnum):
    """Where a job stands that gives a document's chunks their vectors of the model that is being filled."""

    QUEUED = "queued"
    FILLED = "filled"


class JobState(StrEnum):
    """Who may act on a job now."""

    QUEUED = "queued"
    WORKING = "working"
    RETRYABLE = "retryable"
    DONE = "done"
    DEADLETTER = "deadletter"
    CANCELLED = "cancelled"


class ShownStatus(StrEnum):
    """What those who only want to know whether their file is through are told of a document."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


def shown_status(state: str, stage: str, *, awaited: bool = False) -> ShownStatus:
    """Where a job of documents stands, in four words; as the view `upload_pipeline.upload_history` says it.

    `pending`: nobody has begun, or the bytes have not come. `failed`: in the dead letters, or cancelled.

    Args:
        state: one of `JobState`.
        stage: one of `Stage`.
        awaited: whether the document's bytes are still to come.
    """
    if state == JobState.DONE:
        return ShownStatus.COMPLETED
    if state in (JobState.DEADLETTER, JobState.CANCELLED):
        return ShownStatus.FAILED
    if stage == Stage.QUEUED and (state != JobState.WORKING or awaited):
        return ShownStatus.PENDING
    return ShownStatus.PROCESSING


@dataclass(frozen=True, slots=True)
class StageRow:
    """One row of `upload_pipeline.stages`: position from 0, progress in percent."""

    stage: Stage | PhotoStage
    position: int
    progress: int


DOCUMENT_STAGES: tuple[StageRow, ...] = tuple(
    StageRow(stage, position, progress)
    for position, (stage, progress) in enumerate(
        (
            (Stage.QUEUED, 0),
            (Stage.JOB_VALIDATED, 10),
            (Stage.PARSING, 20),
            (Stage.PARSED, 30),
            (Stage.PARSE_VALIDATED, 35),
            (Stage.CHUNKING, 45),
            (Stage.CHUNKS_BUFFERED, 50),
            (Stage.CHUNKED, 55),
            (Stage.EMBEDDING, 70),
            (Stage.EMBEDDINGS_BUFFERED, 75),
            (Stage.EMBEDDED, 100),
        )
    )
)

PHOTO_STAGES: tuple[StageRow, ...] = tuple(
    StageRow(stage, position, progress)
    for position, (stage, progress) in enumerate(
        (
            (PhotoStage.PENDING_UPLOAD, 0),
            (PhotoStage.UPLOADED, 20),
            (PhotoStage.EXTRACTING, 40),
            (PhotoStage.EXTRACTED, 60),
            (PhotoStage.DETECTING, 80),
            (PhotoStage.COMPLETED, 100),
        )
    )
)
