"""What an operator may ask of a job: to start again, or to stop. The SQL functions decide whether it may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg

from upload_pipeline.database.queue import INVALID_STAGE, INVALID_STATE, NOT_FOUND
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from psycopg import Connection

_CODES = {
    NOT_FOUND: ErrorCode.JOB_NOT_FOUND,
    INVALID_STATE: ErrorCode.INVALID_STATE,
    INVALID_STAGE: ErrorCode.INVALID_STAGE,
}


@dataclass(frozen=True, slots=True)
class Restarted:
    """A job that is ready again."""

    job_id: UUID
    stage: str
    state: str


@dataclass(frozen=True, slots=True)
class Cancellation:
    """What asking a job to stop came to.

    Attributes:
        state: `cancelled`; `working` where a worker has it, who stops at the next step boundary; else the state
            in which the job had ended before.
        cancel_requested: whether the job was ever asked to stop.
    """

    job_id: UUID
    state: str
    cancel_requested: bool


def retry_job(connection: Connection[Any], job_id: UUID, *, from_stage: str | None = None) -> Restarted:
    """Starts an ended job again, at the stage where it stands or at an earlier one.

    Raises:
        PipelineError: `JOB_NOT_FOUND`, `INVALID_STATE` (it has not ended, or is done and no stage was named) or
            `INVALID_STAGE` (not one of its stages, or one that it has not reached).
    """
    row = _call(
        connection, "select job_id, stage, state::text from upload_pipeline.retry_job(%s, %s)", job_id, from_stage
    )
    return Restarted(*row)


def cancel_job(connection: Connection[Any], job_id: UUID) -> Cancellation:
    """Stops a job: at once where nobody works on it. Of an ended job nothing changes.

    Raises:
        PipelineError: `JOB_NOT_FOUND`.
    """
    row = _call(connection, "select job_id, state::text, cancel_requested from upload_pipeline.cancel_job(%s)", job_id)
    return Cancellation(*row)


def _call(connection: Connection[Any], query: str, *arguments: object) -> tuple[Any, ...]:
    try:
        with connection.transaction(), connection.cursor() as cursor:
            row = cursor.execute(query, arguments).fetchone()
    except psycopg.Error as error:
        code = _CODES.get(error.sqlstate or "")
        if code is None:
            raise
        message = (error.diag.message_primary or str(error)).rstrip(".")
        hint = f" {error.diag.message_hint}" if error.diag.message_hint else ""
        raise PipelineError(code, f"{message[:1].upper()}{message[1:]}.{hint}") from error
    if row is None:
        raise PipelineError(ErrorCode.INTERNAL, f"{query!r} gave no row.")
    return tuple(row)
