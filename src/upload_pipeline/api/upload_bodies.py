"""Bodies of the routes of uploads."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from upload_pipeline.stages import JobState

JOB = "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"
DOCUMENT = "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49"
_STATUS_URL = f"https://api.example.com/api/v2/jobs/{JOB}"

METADATA_MEANING = (
    "What you say about the file: names, each with a string, a number, true or false, or a list of these."
)


class UploadRequest(BaseModel):
    """A file that is announced; its bytes are sent afterwards, to the URL of the answer."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "filename": "policy.pdf",
                    "bytes_len": 48213,
                    "mime": "application/pdf",
                    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                    "metadata": {"department": "claims"},
                }
            ]
        },
    )

    filename: str = Field(min_length=1, max_length=1000, description="For people; its extension tells kinds of text.")
    bytes_len: int = Field(ge=1, le=2**53, description="The exact size of the file in bytes.")
    mime: str = Field(min_length=1, max_length=200, description="Its media type; the bytes are checked against it.")
    sha256: Annotated[str, StringConstraints(to_lower=True)] = Field(
        pattern="^[0-9a-fA-F]{64}$", description="SHA-256 of the bytes in hexadecimal; they are checked against it."
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description=METADATA_MEANING)
    project_id: UUID | None = Field(default=None, description="Kept as `project_id` of the metadata.")


class UploadForm(BaseModel):
    """A file with what belongs to it, as a form. The parts may come in any order, each once."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"file": "…", "metadata": {"department": "claims"}}]}
    )

    file: bytes = Field(
        description="The file, with its name; the type is told by its content.", json_schema_extra={"format": "binary"}
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description=f"As JSON. {METADATA_MEANING}")


class Upload(BaseModel):
    """A document, and the job that makes it searchable.

    Where the bytes are still to be sent, `upload_url` says where to; all `upload_*` are null where they are not.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "document_id": DOCUMENT,
                    "job_id": JOB,
                    "duplicate": False,
                    "status_url": _STATUS_URL,
                    "upload_url": f"https://api.example.com/api/v2/upload/{DOCUMENT}/bytes?token=eyJtIjoi…",
                    "upload_method": "PUT",
                    "upload_headers": {"Content-Type": "application/pdf"},
                    "upload_expires_at": "2026-11-21T09:15:00Z",
                },
            ]
        }
    )

    document_id: UUID
    job_id: UUID | None = Field(description="Null where the document was there before and its jobs have been removed.")
    duplicate: bool = Field(description="Whether you had sent the same bytes before: then nothing is done twice.")
    status_url: str | None = Field(description="Where the job tells how far it is.")
    upload_url: str | None = Field(default=None, description="Send the bytes there, exactly as announced.")
    upload_method: Literal["PUT"] | None = Field(default=None, description="The method of that request.")
    upload_headers: dict[str, str] | None = Field(default=None, description="Headers that it must have.")
    upload_expires_at: datetime | None = Field(
        default=None, description="It must begin before. Ask again for another URL; the job waits a little longer."
    )


class UploadCompleted(BaseModel):
    """The job of an upload whose bytes are there."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "document_id": DOCUMENT,
                    "job_id": JOB,
                    "stage": "queued",
                    "state": "queued",
                    "status_url": _STATUS_URL,
                }
            ]
        },
    )

    document_id: UUID
    job_id: UUID | None = Field(description="Null, like what follows, where the document's jobs have been removed.")
    stage: str | None
    state: JobState | None
    status_url: str | None
