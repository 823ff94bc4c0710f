"""What an operator may do with embedding models, and how far a change is. The SQL functions decide what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import class_row

from upload_pipeline.database.queue import INVALID_STATE, NOT_FOUND, NOT_WHOLE
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from psycopg import Connection

_CODES = {
    NOT_FOUND: ErrorCode.INVALID_ARGUMENT,
    INVALID_STATE: ErrorCode.INVALID_STATE,
    NOT_WHOLE: ErrorCode.INVALID_ARGUMENT,
}


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A row of `model_overview`.

    Attributes:
        status: `building`, `active`, `retiring` or `retired`.
        retire_at: when the vectors of a retiring model may go.
        chunks: live chunks of all users.
        filled_chunks: those that have a vector of this model; None of a retired one, as the two below.
        lacking_chunks: those that have none.
        lacking_documents: documents with such chunks.
        vectors: of this model, wherever they stand.
        chunks_per_second: of the last five minutes; None of a model that is not being filled.
        time_left: until it is filled, at that rate; None where nothing tells.
        open_jobs: jobs of its filling that have not ended.
        failed_documents: whose job has failed for good since the model was added.
        failed_at: when the provider of a model that is being filled failed last, if that is not long ago.
        failure: what it said then.
    """

    model: str
    provider: str
    dimensions: int
    status: str
    paused: bool
    created_at: datetime
    building_since: datetime | None
    activated_at: datetime | None
    retire_at: datetime | None
    chunks: int
    filled_chunks: int | None
    lacking_chunks: int | None
    lacking_documents: int | None
    vectors: int
    chunks_per_second: float | None
    time_left: timedelta | None
    open_jobs: int
    failed_documents: int
    failed_at: datetime | None
    failure: str | None


def add_model(connection: Connection[Any], *, model: str, provider: str, dimensions: int, paused: bool) -> str:
    """Begins to fill a model, or begins anew; returns its status, `active` of the first model of all.

    Raises:
        PipelineError: `INVALID_STATE` where it is active or another one is being filled; `INVALID_ARGUMENT` where it is
            registered with another provider or other dimensions.
    """
    return str(
        _call(
            connection,
            "select upload_pipeline.add_model(%s, %s, %s, %s)::text",
            model,
            provider,
            dimensions,
            paused,
        )
    )


def pause_model(connection: Connection[Any], model: str, *, paused: bool) -> None:
    """Stops the filling of a model, or lets it go on.

    Raises:
        PipelineError: `INVALID_STATE` where it is not being filled.
    """
    _call(connection, "select upload_pipeline.pause_model(%s, %s)", model, paused)


def activate_model(connection: Connection[Any], model: str, *, grace: timedelta) -> str | None:
    """Makes a filled model the active one; returns the one that was active.

    Raises:
        PipelineError: `INVALID_STATE` where chunks lack a vector of it, or it is retired; `INVALID_ARGUMENT` where
            there is no such model.
    """
    before: str | None = _call(connection, "select upload_pipeline.activate_model(%s, %s)", model, grace)
    return before


def retire_model(connection: Connection[Any], model: str, *, now: bool) -> int:
    """Gives up a model; returns how many jobs were cancelled.

    Raises:
        PipelineError: `INVALID_STATE` where it is active, or its grace time is not over; `INVALID_ARGUMENT` where there
            is no such model.
    """
    return int(_call(connection, "select upload_pipeline.retire_model(%s, %s)", model, now))


def list_models(connection: Connection[Any]) -> list[ModelStatus]:
    """All models, the one in use first. Counts chunks and vectors: seconds where there are millions."""
    with connection.cursor(row_factory=class_row(ModelStatus)) as cursor:
        return cursor.execute(
            """
            select model, provider, dimensions, status::text as status, paused, created_at, building_since,
                   activated_at, retire_at, chunks, filled_chunks, lacking_chunks, lacking_documents, vectors,
                   chunks_per_second, time_left, open_jobs, failed_documents, failed_at, failure
              from upload_pipeline.model_overview
             order by array_position(array['active', 'building', 'retiring', 'retired'], status::text), created_at
            """
        ).fetchall()


def _call(connection: Connection[Any], query: str, *arguments: object) -> Any:
    try:
        with connection.cursor() as cursor:
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
    return row[0]
