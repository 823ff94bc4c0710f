"""The queue's verbs: one function for each SQL function of `sql/schema/04_*.sql`, which tell what they do.

Every function takes whatever can run one statement, a pool or a connection, and is one round trip. None opens a
transaction of its own: a verb is atomic by itself, and a caller that wants several in one opens it around them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LEASE_LOST = "UP001"
NOT_FOUND = "UP002"
INVALID_STATE = "UP003"
INVALID_STAGE = "UP004"
NOT_WHOLE = "UP005"
NOT_ALLOWED = "UP006"

WAKE_CHANNEL = "upload_pipeline_jobs"
"""Where `wake_lanes` notifies; the payload is the pool."""


class Executor(Protocol):
    """Runs one statement: an `asyncpg.Pool` or an `asyncpg.Connection`."""

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        """All rows."""

    async def fetchrow(self, query: str, *args: Any) -> Any:
        """The first row, or None."""

    async def fetchval(self, query: str, *args: Any) -> Any:
        """The first column of the first row, or None."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write for a job, as long as the database still has this token on the row."""

    job_id: UUID
    token: int


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that `claim_jobs` leased to this worker.

    Attributes:
        subject_id: the document or the photo that it is about; which one, the pipeline says.
    """

    lease: Lease
    subject_id: UUID
    user_id: UUID
    pipeline: str
    stage: str
    retry_count: int
    correlation_id: str

    @property
    def job_id(self) -> UUID:
        """The job's id, which the lease carries."""
        return self.lease.job_id

    @property
    def document_id(self) -> UUID:
        """The subject, of a job that is about a document."""
        return self.subject_id

    @property
    def photo_id(self) -> UUID:
        """The subject, of a job that is about a photo."""
        return self.subject_id


@dataclass(frozen=True, slots=True)
class Advance:
    """What a worker asks for when a step is done.

    Attributes:
        keep: True to lead the job on if its next stage is served by the same pool.
        results: kept for the job's owner, usually at its end.
    """

    lease: Lease
    from_stage: str
    to_stage: str
    keep: bool
    results: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Transition:
    """Where a job stands after a step: `state` is `working` where the lease was kept."""

    job_id: UUID
    stage: str
    state: str


@dataclass(frozen=True, slots=True)
class EnqueuedJob:
    """A live job of a document; `created` is False where there was one already."""

    job_id: UUID
    document_id: UUID
    created: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of a job that failed: `retryable` until `run_at`, `deadletter` or `cancelled`."""

    state: str
    retry_count: int
    run_at: datetime | None


async def enqueue_jobs(
    db: Executor,
    documents: Sequence[tuple[UUID, UUID]],
    *,
    pipeline: str = "document",
    priority: int = 0,
    correlation_id: str = "",
) -> list[EnqueuedJob]:
    """Makes a job for each (document id, user id); a document with a live job gets that one back."""
    rows = await db.fetch(
        "select * from upload_pipeline.enqueue_jobs($1, $2, $3, $4, $5)",
        [document for document, _ in documents],
        [user for _, user in documents],
        pipeline,
        priority,
        correlation_id,
    )
    return [EnqueuedJob(row["job_id"], row["document_id"], row["created"]) for row in rows]


async def claim_jobs(
    db: Executor, *, worker_id: UUID, pool: str, limit: int, after_user: UUID | None, ttl: timedelta
) -> list[ClaimedJob]:
    """Leases up to `limit` ready jobs of a pool; the last row's user is the next call's `after_user`."""
    rows = await db.fetch(
        "select * from upload_pipeline.claim_jobs($1, $2, $3, $4, $5)",
        worker_id,
        pool,
        limit,
        after_user,
        ttl,
    )
    return [
        ClaimedJob(
            Lease(row["job_id"], row["lease_token"]),
            row["subject_id"],
            row["user_id"],
            row["pipeline"],
            row["stage"],
            row["retry_count"],
            row["correlation_id"],
        )
        for row in rows
    ]


async def advance_jobs(db: Executor, asked: Sequence[Advance], *, ttl: timedelta) -> dict[UUID, Transition]:
    """Moves jobs one stage on, in one statement; a job whose token is stale is missing from the answer.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP004 where a stage is not the next one; then none is moved.
    """
    results = [None if item.results is None else json.dumps(item.results) for item in asked]
    rows = await db.fetch(
        "select job_id, stage, state from upload_pipeline.advance_jobs($1, $2, $3, $4, $5, $6, $7)",
        [item.lease.job_id for item in asked],
        [item.lease.token for item in asked],
        [item.from_stage for item in asked],
        [item.to_stage for item in asked],
        [item.keep for item in asked],
        ttl,
        results if any(results) else None,
    )
    return {row["job_id"]: Transition(row["job_id"], row["stage"], row["state"]) for row in rows}


async def snooze_job(db: Executor, lease: Lease, *, delay: timedelta) -> datetime | None:
    """Gives a job back until later, no retry counted; returns when, or None where it ended cancelled."""
    moment: datetime | None = await db.fetchval(
        "select upload_pipeline.snooze_job($1, $2, $3)", lease.job_id, lease.token, delay
    )
    return moment


async def fail_job(
    db: Executor,
    lease: Lease,
    *,
    code: str,
    message: str,
    retryable: bool,
    details: Mapping[str, Any] | None = None,
) -> Failure:
    """Records that a step failed, and schedules the retry or ends the job.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP001 where the lease is lost.
    """
    row = await db.fetchrow(
        "select state, retry_count, run_at from upload_pipeline.fail_job($1, $2, $3, $4, $5, $6)",
        lease.job_id,
        lease.token,
        code,
        message,
        retryable,
        json.dumps(details) if details else None,
    )
    return Failure(row["state"], row["retry_count"], row["run_at"])


async def release_jobs(db: Executor, leases: Sequence[Lease]) -> dict[UUID, str]:
    """Hands jobs back, retry counts untouched; returns the state of each that was still held."""
    rows = await db.fetch(
        "select job_id, state from upload_pipeline.release_jobs($1, $2)",
        [lease.job_id for lease in leases],
        [lease.token for lease in leases],
    )
    return {row["job_id"]: row["state"] for row in rows}


async def retry_job(
    db: Executor, job_id: UUID, *, from_stage: str | None, correlation_id: str | None = None
) -> Transition:
    """Starts an ended job again, where it stands or at an earlier stage.

    Args:
        db: as role `upload_worker`.
        job_id: of the job.
        from_stage: where it starts; None: where it stands.
        correlation_id: of the request, for all that follows; None: the job keeps the one that it has.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 (no such job), UP003 (its state does not allow it), UP004 (the stage).
    """
    row = await db.fetchrow(
        """
        select job_id, stage, state::text as state
          from upload_pipeline.retry_job($1, $2, p_correlation_id => $3)
        """,
        job_id,
        from_stage,
        correlation_id,
    )
    return Transition(**row)


async def cancel_job(db: Executor, job_id: UUID, *, correlation_id: str | None = None) -> tuple[str, bool]:
    """Stops a job: at once where nobody works on it. Returns its state, and whether it was ever asked to stop.

    Args:
        db: as role `upload_worker`.
        job_id: of the job.
        correlation_id: of the request, for all that follows; None: the job keeps the one that it has.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 where there is no such job.
    """
    row = await db.fetchrow(
        "select state::text as state, cancel_requested from upload_pipeline.cancel_job($1, $2)", job_id, correlation_id
    )
    return row["state"], row["cancel_requested"]


async def promote_due(db: Executor, *, limit: int = 100) -> int:
    """Makes due retries and snoozes ready; returns how many."""
    return int(await db.fetchval("select upload_pipeline.promote_due($1)", limit))


async def reap_expired(db: Executor, *, limit: int = 100) -> int:
    """Takes back jobs whose lease ran out; returns how many."""
    return int(await db.fetchval("select upload_pipeline.reap_expired($1)", limit))


async def record_fenced_write(db: Executor, lease: Lease, *, worker_id: UUID) -> None:
    """Notes that a write under a lost lease was refused."""
    await db.fetchval("select upload_pipeline.record_fenced_write($1, $2, $3)", lease.job_id, lease.token, worker_id)


async def register_worker(
    db: Executor,
    *,
    worker_id: UUID,
    host: str,
    pid: int,
    version: str,
    pools: Sequence[str],
    concurrency: int,
) -> None:
    """Enters a worker process in the register."""
    await db.fetchval(
        "select upload_pipeline.register_worker($1, $2, $3, $4, $5, $6)",
        worker_id,
        host,
        pid,
        version,
        list(pools),
        concurrency,
    )


async def leave_pools(db: Executor, *, worker_id: UUID, left_pools: Sequence[str]) -> None:
    """Tells which of its pools a worker leaves to others for now."""
    await db.fetchval("select upload_pipeline.leave_pools($1, $2)", worker_id, list(left_pools))


async def unregister_worker(db: Executor, *, worker_id: UUID) -> None:
    """Removes a worker process from the register."""
    await db.fetchval("select upload_pipeline.unregister_worker($1)", worker_id)


async def load_steps(db: Executor) -> dict[tuple[str, str], str]:
    """The next stage of each (pipeline, stage) that is not final."""
    rows = await db.fetch(
        """
        select f.pipeline, f.stage, t.stage as next_stage
          from upload_pipeline.stages f
          join upload_pipeline.stages t on t.pipeline = f.pipeline and t.position = f.position + 1
        """
    )
    return {(row["pipeline"], row["stage"]): row["next_stage"] for row in rows}
