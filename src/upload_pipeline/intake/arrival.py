"""What comes with a file, checked before a byte of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.filenames import display_name
from upload_pipeline.intake.metadata import check_metadata

MAX_CORRELATION_CHARS = 200
"""As the column `upload_jobs.correlation_id` has it."""

_NIL = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a file before its bytes, in the form that it is stored in."""

    filename: str
    user_id: UUID
    metadata: dict[str, Any]
    correlation_id: str
    priority: int


def check_arrival(
    filename: str, user_id: UUID, metadata: Mapping[str, Any], correlation_id: str, priority: int
) -> Arrival:
    """Checks what comes with a file.

    Raises:
        PipelineError: `INVALID_METADATA` or `INVALID_ARGUMENT`, naming what is wrong and what is allowed.
    """
    if user_id == _NIL:
        raise invalid_argument("user_id", str(user_id), "the id of a user, not the nil UUID")
    if len(correlation_id) > MAX_CORRELATION_CHARS or not correlation_id.isprintable():
        raise invalid_argument(
            "correlation_id",
            correlation_id[:MAX_CORRELATION_CHARS],
            f"at most {MAX_CORRELATION_CHARS} printable characters",
        )
    if not -32768 <= priority <= 32767:
        raise invalid_argument("priority", priority, "a number from -32768 to 32767")
    return Arrival(display_name(filename), user_id, check_metadata(metadata), correlation_id, priority)


def invalid_argument(name: str, value: object, allowed: str) -> PipelineError:
    """The error of an argument that is not what it must be."""
    return PipelineError(
        ErrorCode.INVALID_ARGUMENT, f"{name} is {value!r}, it must be {allowed}.", {"argument": name, "value": value}
    )
