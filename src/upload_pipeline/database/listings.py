"""What terminals and tools read: thin typed queries, one each, newest first, every one of them bounded.

All run as `upload_worker`, which may read every row. The first ones take a synchronous psycopg connection; the last
two stand beside a running intake and take its asyncpg pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from psycopg.rows import class_row, dict_row

from upload_pipeline.database.batches import BATCH_COLUMNS, BatchStatus, batch_status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class JobListing:
    """A job as a person asks after it.

    Attributes:
        document_id: what it is about; None where that is a photo, and the other way round.
        progress: percent that the stage stands for.
        error_code: of the last failure, also while the job waits for its next try; None where it never failed or
            has been started again.
        results: what the job came to; None before its end.
    """

    job_id: UUID
    document_id: UUID | None
    photo_id: UUID | None
    user_id: UUID
    filename: str
    pipeline: str
    stage: str
    state: str
    progress: int
    pool: str
    priority: int
    retry_count: int
    cancel_requested: bool
    run_at: datetime
    created_at: datetime
    started_at: datetime | None
    updated_at: datetime
    finished_at: datetime | None
    error_code: str | None
    error_message: str | None
    results: dict[str, Any] | None
    worker_id: UUID | None
    lease_expires_at: datetime | None
    correlation_id: str


@dataclass(frozen=True, slots=True)
class EventListing:
    """One line of a job's history."""

    event_id: int
    at: datetime
    code: str
    severity: str
    stage: str | None
    worker_id: UUID | None
    lease_token: int | None
    payload: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class DocumentListing:
    """A document with its latest job.

    Attributes:
        job_id: the latest job; None, like `state` and `stage`, where its jobs have been removed.
        searchable_at: since when it can be found; None while it cannot.
    """

    document_id: UUID
    user_id: UUID
    filename: str
    media_type: str
    file_bytes: int
    file_sha256: str
    metadata: dict[str, Any]
    page_count: int | None
    chunk_count: int | None
    embed_model: str | None
    warnings: list[str]
    created_at: datetime
    searchable_at: datetime | None
    job_id: UUID | None
    state: str | None
    stage: str | None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a job stands, as a progress display needs it.

    Attributes:
        progress: percent that the stage stands for.
        run_at: when a job in `retryable` is tried again.
        chunk_count: chunks of the document; None before it has any.
    """

    job_id: UUID
    stage: str
    state: str
    progress: int
    retry_count: int
    run_at: datetime
    chunk_count: int | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """A worker process that the register has heard of lately, with the pools that it serves now."""

    worker_id: UUID
    host: str
    pid: int
    pools: tuple[str, ...]


_JOB_COLUMNS = """
    job_id, document_id, photo_id, user_id, filename, pipeline, stage, state::text as state, progress, pool, priority,
    retry_count, cancel_requested, run_at, created_at, started_at, updated_at, finished_at, error_code, error_message,
    results, worker_id, lease_expires_at, correlation_id
"""


def list_jobs(
    connection: Connection[Any],
    *,
    state: str | None = None,
    user_id: UUID | None = None,
    pipeline: str | None = None,
    limit: int,
) -> list[JobListing]:
    """The newest jobs, of all users or one, in any state or one; without a pipeline those that users asked for."""
    with connection.cursor(row_factory=class_row(JobListing)) as cursor:
        cursor.execute(
            f"""
            select {_JOB_COLUMNS}
              from upload_pipeline.job_overview
             where (%(state)s::text is null or state = %(state)s::text::upload_pipeline.job_state)
               and (%(user)s::uuid is null or user_id = %(user)s)
               and case when %(pipeline)s::text is null then pipeline <> 'reembed' else pipeline = %(pipeline)s end
             order by created_at desc, seq desc
             limit %(limit)s
            """,  # noqa: S608 - the columns are a constant
            {"state": state, "user": user_id, "pipeline": pipeline, "limit": limit},
        )
        return cursor.fetchall()


def find_job(connection: Connection[Any], job_id: UUID) -> JobListing | None:
    """One job, or None."""
    with connection.cursor(row_factory=class_row(JobListing)) as cursor:
        cursor.execute(f"select {_JOB_COLUMNS} from upload_pipeline.job_overview where job_id = %s", (job_id,))  # noqa: S608
        return cursor.fetchone()


def list_events(connection: Connection[Any], job_id: UUID, *, limit: int) -> list[EventListing]:
    """A job's last events, oldest first."""
    with connection.cursor(row_factory=class_row(EventListing)) as cursor:
        cursor.execute(
            """
            select * from (
              select event_id, at, code::text as code, severity::text as severity, stage, worker_id, lease_token,
                     payload
                from upload_pipeline.events where job_id = %s
               order by event_id desc limit %s) e
             order by event_id
            """,
            (job_id, limit),
        )
        return cursor.fetchall()


def list_documents(connection: Connection[Any], *, user_id: UUID | None = None, limit: int) -> list[DocumentListing]:
    """The newest documents that are not being deleted, of all users or one."""
    with connection.cursor(row_factory=class_row(DocumentListing)) as cursor:
        cursor.execute(
            """
            select d.document_id, d.user_id, d.filename, d.media_type, d.file_bytes, d.file_sha256, d.metadata,
                   d.page_count, d.chunk_count, d.embed_model, d.warnings, d.created_at, d.searchable_at,
                   j.job_id, j.state, j.stage
              from upload_pipeline.documents d
              left join lateral (
                select j.job_id, j.state::text as state, j.stage from upload_pipeline.upload_jobs j
                 where j.document_id = d.document_id and j.pipeline <> 'reembed' order by j.seq desc limit 1) j on true
             where d.deleted_at is null and (%(user)s::uuid is null or d.user_id = %(user)s)
             order by d.created_at desc, d.document_id
             limit %(limit)s
            """,
            {"user": user_id, "limit": limit},
        )
        return cursor.fetchall()


def find_batch(connection: Connection[Any], batch_id: UUID) -> BatchStatus | None:
    """How far a batch is, without an estimate, or None."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            f"select {BATCH_COLUMNS} from upload_pipeline.batch_overview o where o.batch_id = %s",  # noqa: S608
            [batch_id],
        ).fetchone()
    return batch_status(row) if row else None


async def job_progress(db: Executor, job_ids: Sequence[UUID]) -> dict[UUID, JobProgress]:
    """Where jobs stand; one that is missing has been removed with its document."""
    rows = await db.fetch(
        """
        select j.job_id, j.stage, j.state::text as state, s.progress, j.retry_count, j.run_at, d.chunk_count,
               o.error_code, o.error_message
          from upload_pipeline.upload_jobs j
          join upload_pipeline.documents d on d.document_id = j.document_id
          join upload_pipeline.stages s on s.pipeline = j.pipeline and s.stage = j.stage
          left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
         where j.job_id = any($1)
        """,
        list(job_ids),
    )
    return {row["job_id"]: JobProgress(**row) for row in rows}


async def live_workers(db: Executor, *, silence: timedelta) -> tuple[list[LiveWorker], set[str]]:
    """The workers heard of within `silence`, and the pools of the stages that users wait for."""
    rows = await db.fetch(
        """
        select worker_id, host, pid, array(select unnest(pools) except select unnest(left_pools)) as pools
          from upload_pipeline.workers
         where last_beat_at > upload_pipeline.now() - $1::interval
        """,
        silence,
    )
    pools = await db.fetch("select distinct pool from upload_pipeline.stages where not final and pipeline <> 'reembed'")
    return (
        [LiveWorker(row["worker_id"], row["host"], row["pid"], tuple(row["pools"])) for row in rows],
        {row["pool"] for row in pools},
    )
