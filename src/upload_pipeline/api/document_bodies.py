"""Bodies of the routes of documents."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from upload_pipeline.api.job_bodies import JobError
from upload_pipeline.stages import JobState

_DOCUMENT = "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49"

_JOB_EXAMPLE: dict[str, Any] = {
    "job_id": "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11",
    "pipeline": "document",
    "stage": "embedded",
    "state": "done",
    "progress": 100,
    "error": None,
}

DOCUMENT_EXAMPLE: dict[str, Any] = {
    "document_id": _DOCUMENT,
    "filename": "homeowners-policy.pdf",
    "media_type": "application/pdf",
    "file_bytes": 48213,
    "file_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "metadata": {"department": "claims"},
    "markdown_sha256": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
    "markdown_chars": 31240,
    "page_count": 12,
    "chunk_count": 24,
    "warnings": [],
    "created_at": "2026-11-21T09:00:00.000000Z",
    "updated_at": "2026-11-21T09:00:07.250000Z",
    "searchable_at": "2026-11-21T09:00:07.250000Z",
    "upload_deadline": None,
    "job": _JOB_EXAMPLE,
}

_CHUNK_EXAMPLE: dict[str, Any] = {
    "chunk_id": "5b8f1c0e-26f0-5c3c-9a4e-8d1f6e0c7b21",
    "ordinal": 6,
    "text": "## Deductibles\n\nWater damage: 1,500 USD for each loss.",
    "start": 8120,
    "end": 8172,
    "page_from": 4,
    "page_to": 4,
    "heading_path": ["Homeowners policy", "Deductibles"],
}

MARKDOWN_EXAMPLE = "# Homeowners policy\n\n## Deductibles\n\nWater damage: 1,500 USD for each loss.\n"


class DocumentJob(BaseModel):
    """Where the newest job of a document stands; `GET /api/v2/jobs/{job_id}` tells more."""

    model_config = ConfigDict(from_attributes=True)

    job_id: UUID
    pipeline: str
    stage: str
    state: JobState
    progress: int = Field(ge=0, le=100, description="Percent that the stage stands for.")
    error: JobError | None = Field(description="The last failure; null where there was none, or where it is mended.")


class Document(BaseModel):
    """A file of yours, and what has become of it."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [DOCUMENT_EXAMPLE]})

    document_id: UUID
    filename: str = Field(description="To be shown; it names nothing.")
    media_type: str = Field(description="By its content.")
    file_bytes: int
    file_sha256: str = Field(description="Of its bytes, in hexadecimal.")
    metadata: dict[str, Any] = Field(description="What was said of it when it was uploaded.")
    markdown_sha256: str | None = Field(description="Of its text as Markdown in UTF-8; null while there is none.")
    markdown_chars: int | None = Field(description="Characters of its text as Markdown; null while there is none.")
    page_count: int | None = Field(description="Null where the format has no pages, and before it was parsed.")
    chunk_count: int | None = Field(description="Null until it is searchable.")
    warnings: list[str] = Field(description="What parsing had to leave out.")
    created_at: datetime
    updated_at: datetime
    searchable_at: datetime | None = Field(description="Since when searches find it; null while they do not.")
    upload_deadline: datetime | None = Field(
        description="Until when its bytes may come; null once they are here. Until then size, sha256 and type are "
        "what was announced."
    )
    job: DocumentJob | None = Field(description="Its newest job; null where its jobs have been removed.")


class DocumentPage(BaseModel):
    """Documents, newest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [DOCUMENT_EXAMPLE], "next_cursor": None}]})

    items: list[Document]
    next_cursor: str | None = Field(description="The parameter `cursor` of the next page; null at the end.")


class Chunk(BaseModel):
    """A passage of a document as searches find it."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [_CHUNK_EXAMPLE]})

    chunk_id: UUID
    ordinal: int = Field(description="Its place among the document's chunks, from 0.")
    text: str = Field(description="As it was embedded, so with what it repeats of the chunk before.")
    start: int = Field(description="First character in the document's Markdown, from 0.")
    end: int = Field(description="One past its last character.")
    page_from: int | None = Field(description="Where it begins, from 1; null where the format has no pages.")
    page_to: int | None = Field(description="Where it ends.")
    heading_path: list[str] = Field(description="Titles of the sections around it, outermost first.")


class ChunkPage(BaseModel):
    """Chunks of a document, in its order."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [_CHUNK_EXAMPLE], "next_cursor": None}]})

    items: list[Chunk]
    next_cursor: str | None = Field(description="The parameter `cursor` of the next page; null at the end.")


_DOWNLOAD_EXAMPLE: dict[str, Any] = {
    "download_url": f"https://files.example.com/api/v2/documents/{_DOCUMENT}/bytes?token=eyJtIjoiR0VUIn0.c2ln",
    "expires_at": "2026-11-21T09:05:00Z",
    "filename": "homeowners-policy.pdf",
    "media_type": "application/pdf",
    "file_bytes": 48213,
}


class Download(BaseModel):
    """Where a document's bytes are fetched from, for a while."""

    model_config = ConfigDict(json_schema_extra={"examples": [_DOWNLOAD_EXAMPLE]})

    download_url: str = Field(description="To be fetched with GET, as it is, without credentials.")
    expires_at: datetime = Field(description="From then on the URL is refused.")
    filename: str
    media_type: str
    file_bytes: int
