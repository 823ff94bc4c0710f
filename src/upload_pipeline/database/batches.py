"""Batches: one function for each SQL function of `sql/schema/06_batches.sql`, which tells what they do; the status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a batch whose bytes are in the store."""

    filename: str
    document_id: UUID
    media_type: str
    file_bytes: int
    file_sha256: str
    raw_key: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RefusedFile:
    """A file of a batch that failed its checks."""

    filename: str
    error_code: str
    error_message: str


@dataclass(frozen=True, slots=True)
class BatchMember:
    """A file of a batch as it was taken.

    Attributes:
        duplicate: the user had sent these bytes before, or they stand in the batch before.
        error_code: why it was refused; then there is no job.
    """

    ordinal: int
    filename: str
    document_id: UUID | None
    job_id: UUID | None
    duplicate: bool
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class FailedMember:
    """A file of a batch that was not processed."""

    filename: str
    error: str
    code: str
    job_id: UUID | None


@dataclass(frozen=True, slots=True)
class RetriedMember:
    """A failed file of a batch after the batch was retried; `error` and `code` where it was not."""

    filename: str
    job_id: UUID | None
    retried: bool
    error: str | None
    code: str | None


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """How far a batch is; `processed`, `failed` and `open` are `total` together.

    Attributes:
        status: `in_progress`, `completed`, `partial_failure` or `failed`.
        failed_members: in the order of the files.
        estimated_completion_at: of the last files; None where none is open.
        completed_at: when the last file came to its end.
        seconds: from the batch's beginning to its completion, or to now.
    """

    batch_id: UUID
    total: int
    processed: int
    failed: int
    open: int
    status: str
    failed_members: tuple[FailedMember, ...]
    warnings: tuple[str, ...]
    estimated_completion_at: datetime | None
    created_at: datetime
    completed_at: datetime | None
    seconds: float


@dataclass(frozen=True, slots=True)
class CompletedBatch:
    """A batch whose completion was noticed."""

    batch_id: UUID
    user_id: UUID
    correlation_id: str
    status: str
    total: int
    processed: int
    failed: int
    seconds: float


async def create_batch(
    db: Executor,
    *,
    batch_id: UUID,
    user_id: UUID,
    files: Sequence[StoredFile | RefusedFile],
    warnings: Sequence[str],
    priority: int = 0,
    correlation_id: str = "",
) -> list[BatchMember]:
    """Makes a batch with its documents, jobs and events, or gives back the one of this id; one transaction."""
    rows = await db.fetch(
        """
        select ordinal, filename, document_id, job_id, duplicate, error_code, error_message
          from upload_pipeline.create_batch($1, $2, $3, $4, $5, $6)
        """,
        batch_id,
        user_id,
        json.dumps([{"ordinal": ordinal, **_row(file)} for ordinal, file in enumerate(files)]),
        list(warnings),
        priority,
        correlation_id,
    )
    return [BatchMember(**row) for row in rows]


async def retry_batch(db: Executor, batch_id: UUID, *, correlation_id: str | None = None) -> list[RetriedMember]:
    """Starts again what failed of a batch; its failed members. `correlation_id` is told of all that follows.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 where there is no such batch.
    """
    rows = await db.fetch(
        """
        select filename, job_id, retried, error_message as error, error_code as code
          from upload_pipeline.retry_batch($1, $2)
        """,
        batch_id,
        correlation_id,
    )
    return [RetriedMember(**row) for row in rows]


async def cancel_batch(db: Executor, batch_id: UUID, *, correlation_id: str | None = None) -> int:
    """Stops what is under way of a batch; how many jobs that was. `correlation_id` is told of all that follows.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 where there is no such batch.
    """
    return int(await db.fetchval("select count(*) from upload_pipeline.cancel_batch($1, $2)", batch_id, correlation_id))


async def note_completed_batches(db: Executor) -> list[CompletedBatch]:
    """Writes down which batches have come to their end since the last look, each once; those that this call noted."""
    return [CompletedBatch(**row) for row in await db.fetch("select * from upload_pipeline.note_completed_batches()")]


async def note_batch(db: Executor, batch_id: UUID) -> CompletedBatch | None:
    """As `note_completed_batches`, of one batch: None where it is open, or was noted before."""
    row = await db.fetchrow("select * from upload_pipeline.note_batches(array[$1::uuid])", batch_id)
    return CompletedBatch(**row) if row else None


_FAILED = """
(select coalesce(jsonb_agg(jsonb_build_object('filename', m.filename, 'error', m.error_message, 'code', m.error_code,
                                              'job_id', m.job_id) order by m.ordinal), '[]')
   from upload_pipeline.batch_member_overview m
  where m.batch_id = o.batch_id and m.outcome = 'failed')
"""

BATCH_COLUMNS = f"""
o.batch_id, o.total, o.processed, o.failed, o.open, o.status, {_FAILED} as failed_members, o.warnings, o.created_at,
o.completed_at, extract(epoch from coalesce(o.completed_at, upload_pipeline.now()) - o.created_at)::double precision
  as seconds
"""
"""What `batch_status` reads, from `upload_pipeline.batch_overview o`; all but the estimate."""

ESTIMATED = 5
"""Open files, the last ones, by which a batch is estimated: all of them would cost more and say the same."""

_STATUS = f"""
select {BATCH_COLUMNS},
       case when o.open > 0 then (
         select max(e.estimated_completion_at)
           from upload_pipeline.estimate_jobs(array(
                  select m.job_id from upload_pipeline.batch_member_overview m
                   where m.batch_id = o.batch_id and m.outcome = 'open'
                   order by m.ordinal desc limit {ESTIMATED}), $2) e) end as estimated_completion_at
  from upload_pipeline.batch_overview o
 where o.batch_id = $1
"""  # noqa: S608 - the columns are a constant


async def find_batch(connection: Executor, batch_id: UUID, *, default_seconds: float) -> BatchStatus | None:
    """How far a batch of the user is, or None; one statement, so one moment.

    Args:
        connection: made the user's by `as_user`.
        batch_id: of the batch.
        default_seconds: what a whole document is taken to need where there is no history.
    """
    row = await connection.fetchrow(_STATUS, batch_id, default_seconds)
    return batch_status(dict(row)) if row else None


def batch_status(row: dict[str, Any]) -> BatchStatus:
    """The status that a row of `BATCH_COLUMNS`, with or without an estimate, tells."""
    told = row["failed_members"]
    failed = [
        FailedMember(one["filename"], one["error"], one["code"], UUID(one["job_id"]) if one["job_id"] else None)
        for one in (json.loads(told) if isinstance(told, str) else told)
    ]
    return BatchStatus(
        **{
            "estimated_completion_at": None,
            **row,
            "failed_members": tuple(failed),
            "warnings": tuple(row["warnings"]),
        }
    )


def _row(file: StoredFile | RefusedFile) -> dict[str, Any]:
    if isinstance(file, RefusedFile):
        return {"filename": file.filename, "error_code": file.error_code, "error_message": file.error_message}
    return {
        "filename": file.filename,
        "document_id": str(file.document_id),
        "media_type": file.media_type,
        "file_bytes": file.file_bytes,
        "file_sha256": file.file_sha256,
        "raw_key": file.raw_key,
        "metadata": file.metadata,
    }
