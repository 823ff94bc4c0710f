"""Bodies of the routes of batches."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from upload_pipeline.errors import ErrorCode

_BATCH = "0192f0c4-6a1e-7b11-9c55-2f4d7c9a1b30"
_JOB = "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"
_STATUS_URL = f"https://api.example.com/api/v1/documents/ingest/batch/{_BATCH}/status"

Status = Literal["in_progress", "completed", "partial_failure", "failed"]

_STATUS_EXAMPLE: dict[str, Any] = {
    "batch_id": _BATCH,
    "total_documents": 10,
    "processed_count": 8,
    "failed_count": 1,
    "status": "in_progress",
    "failed_documents": [
        {
            "filename": "scan-7.pdf",
            "error": "'scan-7.pdf' is damaged. Export it anew.",
            "code": "CORRUPT_FILE",
            "job_id": None,
        }
    ],
    "warnings": ["line 4 of the mapping: there is no file 'old.pdf' in the batch"],
    "estimated_completion_time": "2026-11-21T09:00:07.250000Z",
    "completed_at": None,
    "processing_time_seconds": 4.21,
}


class BatchForm(BaseModel):
    """Files with what is said about them, as a form: `files`, or one `archive`; the parts may come in any order."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"files": ["…", "…"], "metadata_mapping": "…"}]}
    )

    files: list[bytes] = Field(
        default_factory=list,
        max_length=100,
        description="Each file with its name; the types are told by content.",
        json_schema_extra={"items": {"type": "string", "format": "binary"}},
    )
    archive: bytes | None = Field(
        default=None,
        description="Instead of `files`: a ZIP of them. Paths in it are not used, hidden files are left out.",
        json_schema_extra={"format": "binary"},
    )
    metadata_mapping: bytes | None = Field(
        default=None,
        description="CSV with a header that has `filename`, or JSON: an object of fields by filename.",
        json_schema_extra={"format": "binary"},
    )


class BatchAccepted(BaseModel):
    """A batch whose bytes are stored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "batch_id": _BATCH,
                    "total_documents": 10,
                    "status": "in_progress",
                    "message": "10 files were taken. 1 of them was refused; the status says why.",
                    "status_url": _STATUS_URL,
                }
            ]
        }
    )

    batch_id: UUID
    total_documents: int = Field(description="Files that came, refused ones too.")
    status: Literal["in_progress"] = Field(description="Always this one; `status_url` tells whether it has ended.")
    message: str = Field(description="For a person.")
    status_url: str = Field(description="Where the batch tells how far it is.")


class FailedDocument(BaseModel):
    """A file of a batch that was not processed."""

    model_config = ConfigDict(from_attributes=True)

    filename: str
    error: str = Field(description="For a person: what is wrong and what to do.")
    code: ErrorCode | str = Field(description="Of the closed list of error codes.")
    job_id: UUID | None = Field(description="Null where the file was refused and never became a job.")


class BatchProgress(BaseModel):
    """How far a batch is, counted from its files when it is asked for."""

    model_config = ConfigDict(json_schema_extra={"examples": [_STATUS_EXAMPLE]})

    batch_id: UUID
    total_documents: int
    processed_count: int
    failed_count: int = Field(description="With `processed_count` and what is still open, `total_documents`.")
    status: Status = Field(description="`completed`: none failed; `partial_failure`: some did; `failed`: all did.")
    failed_documents: list[FailedDocument] = Field(description="In the order of the files.")
    warnings: list[str]
    estimated_completion_time: datetime | None = Field(description="Null once nothing is open.")
    completed_at: datetime | None = Field(description="When the last file came to its end; null before.")
    processing_time_seconds: float = Field(description="From the batch's beginning to its end, or to now.")


class RetriedDocument(BaseModel):
    """A failed file of a batch after the batch was retried."""

    model_config = ConfigDict(from_attributes=True)

    filename: str
    job_id: UUID | None
    retried: bool
    error: str | None = Field(description="Why it was not retried.")
    code: ErrorCode | str | None


class BatchRetried(BaseModel):
    """What a retry of a batch came to."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "batch_id": _BATCH,
                    "retried": 1,
                    "status": "in_progress",
                    "documents": [
                        {"filename": "a.pdf", "job_id": _JOB, "retried": True, "error": None, "code": None},
                        {
                            "filename": "empty.txt",
                            "job_id": None,
                            "retried": False,
                            "error": "'empty.txt' is empty. Send a file with content.",
                            "code": "EMPTY_FILE",
                        },
                    ],
                }
            ]
        }
    )

    batch_id: UUID
    retried: int = Field(description="Files whose jobs have been started again.")
    status: Status
    documents: list[RetriedDocument] = Field(description="The files that had failed.")
