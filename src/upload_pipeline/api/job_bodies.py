"""Bodies of the routes of jobs."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from upload_pipeline.errors import ErrorCode
from upload_pipeline.events import EventCode, EventSeverity
from upload_pipeline.stages import JobState

_JOB = "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"
_DOCUMENT = "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49"

JOB_EXAMPLE: dict[str, Any] = {
    "job_id": _JOB,
    "document_id": _DOCUMENT,
    "photo_id": None,
    "pipeline": "document",
    "stage": "embedding",
    "state": "working",
    "progress": 72,
    "retry_count": 0,
    "queued_ahead": 0,
    "estimated_completion_at": "2026-11-21T09:00:07.250000Z",
    "results": None,
    "error": None,
    "created_at": "2026-11-21T09:00:00.000000Z",
    "started_at": "2026-11-21T09:00:00.120000Z",
    "updated_at": "2026-11-21T09:00:05.800000Z",
    "finished_at": None,
}

EVENT_EXAMPLE: dict[str, Any] = {
    "event_id": 1204,
    "at": "2026-11-21T09:00:05.800000Z",
    "code": "job_advanced",
    "severity": "info",
    "stage": "embedding",
    "progress": 70,
    "details": {},
}


class JobError(BaseModel):
    """What went wrong with a job the last time; while the job is `retryable` it is tried again."""

    model_config = ConfigDict(from_attributes=True)

    code: ErrorCode | str = Field(description="Of the closed list of error codes.")
    message: str = Field(description="For a person: what is wrong and what to do.")
    details: dict[str, Any] = Field(description="Facts for a machine.")


class Job(BaseModel):
    """Where a job stands."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [JOB_EXAMPLE]})

    job_id: UUID
    document_id: UUID | None = Field(description="What it is about; null for a job about a photo.")
    photo_id: UUID | None = Field(description="What it is about; null for a job about a document.")
    pipeline: str = Field(description="`document` or `photo`.")
    stage: str = Field(description="The stage that it has reached; a step leads it on from there.")
    state: JobState
    progress: int = Field(ge=0, le=100, description="Percent; finer within `embedding`.")
    retry_count: int = Field(ge=0, description="How often the present stage has been tried again.")
    queued_ahead: int | None = Field(
        description="Jobs that are taken up before this one, 0 while it is at work; null once it has ended."
    )
    estimated_completion_at: datetime | None = Field(
        description="When it should be done, by what the stages took lately for files of this size; null once it has "
        "ended."
    )
    results: dict[str, Any] | None = Field(description="What it came to: counts of what was written.")
    error: JobError | None = Field(description="The last failure; null where there was none, or where it is mended.")
    created_at: datetime
    started_at: datetime | None
    updated_at: datetime
    finished_at: datetime | None


class JobPage(BaseModel):
    """Jobs, newest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [JOB_EXAMPLE], "next_cursor": None}]})

    items: list[Job]
    next_cursor: str | None = Field(description="The parameter `cursor` of the next page; null at the end.")


class Event(BaseModel):
    """One line of a job's history."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [EVENT_EXAMPLE]})

    event_id: int = Field(description="Grows along a job's history.")
    at: datetime
    code: EventCode
    severity: EventSeverity
    stage: str | None
    progress: int | None = Field(description="Percent that the stage stands for.")
    details: dict[str, Any] = Field(description="What the event tells beside its code.")


class EventPage(BaseModel):
    """A job's history, oldest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [EVENT_EXAMPLE], "next_cursor": None}]})

    items: list[Event]
    next_cursor: str | None = Field(description="The parameter `cursor` of the next page; null at the end.")


class RetryRequest(BaseModel):
    """Where to start again."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"from_stage": "chunking"}]})

    from_stage: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="A stage that the job has reached; null: where it stopped. A job that is `done` needs one.",
    )


class JobRestarted(BaseModel):
    """A job that is ready again."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={"examples": [{"job_id": _JOB, "stage": "chunking", "state": "queued"}]},
    )

    job_id: UUID
    stage: str
    state: JobState


class JobCancelled(BaseModel):
    """What asking a job to stop came to."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"job_id": _JOB, "state": "working", "cancel_requested": True}]}
    )

    job_id: UUID
    state: JobState = Field(description="`cancelled`; `working` where it stops at its next step or heartbeat.")
    cancel_requested: bool
