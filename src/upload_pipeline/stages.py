"""The stages of the document pipeline, as `upload_pipeline.stages` has them.

The database owns the rows; this module names them for code that must. A test holds the two against each
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DOCUMENT_PIPELINE = "document"


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


class JobState(StrEnum):
    """Who may act on a job now."""

    QUEUED = "queued"
    WORKING = "working"
    RETRYABLE = "retryable"
    DONE = "done"
    DEADLETTER = "deadletter"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class StageRow:
    """One row of `upload_pipeline.stages`: position from 0, progress in percent."""

    stage: Stage
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
