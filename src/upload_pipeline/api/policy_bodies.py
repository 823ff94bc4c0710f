"""Bodies of the routes of policies."""

from __future__ import annotations

from datetime import date, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from upload_pipeline.errors import ErrorCode

_JOB = "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"
_DOCUMENT = "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49"

ACCEPTED_EXAMPLE: dict[str, Any] = {
    "job_id": _JOB,
    "document_id": _DOCUMENT,
    "status": "pending",
    "estimated_completion_time": "2026-11-21T09:02:30.000000Z",
    "estimated_completion_minutes": 3,
    "status_url": f"https://api.example.com/api/v1/policies/ingest/status/{_JOB}",
}
_STATUS_EXAMPLE: dict[str, Any] = {
    "job_id": _JOB,
    "status": "completed",
    "progress": 100,
    "results": {"nodes_created": 48, "edges_created": 91, "errors": []},
    "error_message": None,
    "created_at": "2026-11-21T09:00:00.000000Z",
    "updated_at": "2026-11-21T09:02:11.480000Z",
    "completed_at": "2026-11-21T09:02:11.480000Z",
    "estimated_completion_time": None,
}


class PolicyState(StrEnum):
    """Where the ingestion of a policy stands."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


class PolicyForm(BaseModel):
    """A policy as a form. The parts may come in any order, each once."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"file": "…", "insurer": "Acme Mutual", "product_name": "Home Plus", "launch_date": "2026-02-28"}
            ]
        },
    )

    file: bytes = Field(
        description="A PDF whose name ends in `.pdf`; its content is checked.", json_schema_extra={"format": "binary"}
    )
    insurer: str = Field(min_length=1, max_length=200, description="Whose product it is.")
    product_name: str = Field(min_length=1, max_length=200, description="What the product is called.")
    launch_date: date = Field(description="The day from which it is sold: YYYY-MM-DD.")


class PolicyAccepted(BaseModel):
    """A policy that is being ingested."""

    model_config = ConfigDict(json_schema_extra={"examples": [ACCEPTED_EXAMPLE]})

    job_id: UUID
    document_id: UUID
    status: PolicyState
    estimated_completion_time: datetime | None = Field(description="Null once it has ended, or where it is not known.")
    estimated_completion_minutes: int | None = Field(
        ge=0, description="The same from now, rounded up; null where the time is."
    )
    status_url: str


class PolicyError(BaseModel):
    """A failure of the ingestion."""

    code: ErrorCode | str = Field(description="Of the closed list of error codes.")
    message: str = Field(description="For a person: what is wrong and what to do.")


class PolicyResults(BaseModel):
    """What the ingestion has written into the knowledge graph."""

    nodes_created: int = Field(ge=0, description="0 until it is completed.")
    edges_created: int = Field(ge=0, description="0 until it is completed.")
    errors: list[PolicyError] = Field(description="The last failure; none where there was none, or where it is mended.")


class PolicyStatus(BaseModel):
    """How far the ingestion of a policy is."""

    model_config = ConfigDict(json_schema_extra={"examples": [_STATUS_EXAMPLE]})

    job_id: UUID
    status: PolicyState = Field(
        description="`pending` until a worker takes it up, `failed` where it was given up or cancelled."
    )
    progress: int = Field(ge=0, le=100, description="Percent.")
    results: PolicyResults
    error_message: str | None = Field(description="Why it has failed; null where it has not.")
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None = Field(description="When it ended, whichever way.")
    estimated_completion_time: datetime | None = Field(description="Null once it has ended.")
