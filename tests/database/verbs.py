"""The SQL verbs as the tests call them, and small worlds for them to act on."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
import pytest

Connection = psycopg.Connection[Any]
T = TypeVar("T")

EPOCH = datetime(2031, 5, 17, 12, 0, 0, tzinfo=UTC)
"""Where the fake clock starts: far from today, so that a verb that reads the real clock is found out."""

STAGES = (
    "queued",
    "job_validated",
    "parsing",
    "parsed",
    "parse_validated",
    "chunking",
    "chunks_buffered",
    "chunked",
    "embedding",
    "embeddings_buffered",
    "embedded",
)


def set_clock(db: Connection, seconds: float = 0) -> None:
    """Sets the verbs' clock on this connection to so many seconds after EPOCH."""
    moment = EPOCH + timedelta(seconds=seconds)
    db.execute("select set_config('upload_pipeline.now', %s, false)", [moment.isoformat()])


def user_number(number: int) -> UUID:
    """A user's id whose order is the number's."""
    return UUID(int=(number << 64) + 1)


def add_document(admin: Connection, user: UUID, document: UUID | None = None) -> UUID:
    """A document with no job."""
    document = document or uuid4()
    admin.execute(
        """
        insert into upload_pipeline.documents
          (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
        values (%s, %s, 'paper.txt', 'text/plain', 10, %s, %s)
        """,
        [document, user, sha256(document.bytes).hexdigest(), str(document)],
    )
    return document


def enqueue(db: Connection, document: UUID, user: UUID, priority: int = 0, pipeline: str = "document") -> UUID:
    """The id of the document's live job."""
    row = db.execute(
        "select * from upload_pipeline.enqueue_job(%s, %s, %s, %s::smallint)", [document, user, pipeline, priority]
    ).fetchone()
    assert row is not None
    job: UUID = row.job_id
    return job


def add_job(admin: Connection, db: Connection, user: UUID | None = None, priority: int = 0) -> UUID:
    """A queued job of a new document."""
    user = user or uuid4()
    return enqueue(db, add_document(admin, user), user, priority)


def claim(
    db: Connection,
    limit: int = 1,
    after: UUID | None = None,
    pool: str = "default",
    worker: UUID | None = None,
    ttl: str = "60 seconds",
) -> list[Any]:
    """What `claim_jobs` leases."""
    return db.execute(
        "select *, subject_id as document_id from upload_pipeline.claim_jobs(%s, %s, %s, %s, %s::interval)",
        [worker or uuid4(), pool, limit, after, ttl],
    ).fetchall()


def claim_one(db: Connection, **options: Any) -> Any:
    """The one job that is there to claim."""
    (lease,) = claim(db, **options)
    return lease


def advance(
    db: Connection,
    lease: Any,
    from_stage: str,
    to_stage: str,
    keep: bool = True,
    ttl: str = "60 seconds",
    results: str | None = None,
) -> Any:
    """The one row that `advance_job` answers."""
    return db.execute(
        "select * from upload_pipeline.advance_job(%s, %s, %s, %s, %s, %s::interval, %s::jsonb)",
        [lease.job_id, lease.lease_token, from_stage, to_stage, keep, ttl, results],
    ).fetchone()


def advance_to(db: Connection, lease: Any, stage: str) -> None:
    """Leads a claimed job from where it was claimed to a stage, step by step, lease kept."""
    path = STAGES[STAGES.index(lease.stage) : STAGES.index(stage) + 1]
    for here, there in itertools.pairwise(path):
        advance(db, lease, here, there)


def advance_many(
    db: Connection, moves: Sequence[tuple[UUID, int, str, str, bool]], ttl: str = "60 seconds"
) -> dict[UUID, Any]:
    """What `advance_jobs` answers for (job, token, from, to, keep), by job."""
    rows = db.execute(
        """
        select * from upload_pipeline.advance_jobs(
          %s::uuid[], %s::bigint[], %s::text[], %s::text[], %s::boolean[], %s::interval)
        """,
        [*([move[i] for move in moves] for i in range(5)), ttl],
    ).fetchall()
    return {row.job_id: row for row in rows}


def renew(
    db: Connection, leases: Sequence[Any], ttl: str = "60 seconds", worker: UUID | None = None
) -> dict[UUID, bool]:
    """Which leases were renewed, and whether a cancel was asked for."""
    rows = db.execute(
        "select * from upload_pipeline.renew_leases(%s, %s::uuid[], %s::bigint[], %s::interval)",
        [worker or uuid4(), [x.job_id for x in leases], [x.lease_token for x in leases], ttl],
    ).fetchall()
    return {row.job_id: row.cancel_requested for row in rows}


def fail(
    db: Connection, lease: Any, retryable: bool = True, jitter: float | None = 0.5, code: str = "PARSER_FAILED"
) -> Any:
    """The one row that `fail_job` answers."""
    return db.execute(
        "select * from upload_pipeline.fail_job(%s, %s, %s, 'it broke', %s, null, %s)",
        [lease.job_id, lease.lease_token, code, retryable, jitter],
    ).fetchone()


def release(db: Connection, leases: Sequence[Any]) -> dict[UUID, str]:
    """The state of each job that was handed back."""
    rows = db.execute(
        "select * from upload_pipeline.release_jobs(%s::uuid[], %s::bigint[])",
        [[x.job_id for x in leases], [x.lease_token for x in leases]],
    ).fetchall()
    return {row.job_id: row.state for row in rows}


def snooze(db: Connection, lease: Any, delay: str = "30 seconds") -> datetime | None:
    """When the job is due again."""
    moment: datetime | None = value(
        db, "select upload_pipeline.snooze_job(%s, %s, %s::interval)", lease.job_id, lease.lease_token, delay
    )
    return moment


def reap(db: Connection, limit: int = 100) -> int:
    """How many jobs were taken back."""
    return int(value(db, "select upload_pipeline.reap_expired(%s)", limit))


def promote(db: Connection, limit: int = 100) -> int:
    """How many jobs became ready."""
    return int(value(db, "select upload_pipeline.promote_due(%s)", limit))


def retry(db: Connection, job: UUID, stage: str | None = None, force: bool = False) -> Any:
    """The one row that `retry_job` answers."""
    return db.execute("select * from upload_pipeline.retry_job(%s, %s, %s)", [job, stage, force]).fetchone()


def cancel(db: Connection, job: UUID) -> Any:
    """The one row that `cancel_job` answers."""
    return db.execute("select * from upload_pipeline.cancel_job(%s)", [job]).fetchone()


def value(db: Connection, query: str, *arguments: Any) -> Any:
    """The first column of the first row."""
    row = db.execute(query, arguments).fetchone()  # type: ignore[arg-type]
    assert row is not None, query
    return row[0]


def job_row(db: Connection, job: UUID) -> Any:
    """The job as it stands."""
    return db.execute("select * from upload_pipeline.upload_jobs where job_id = %s", [job]).fetchone()


def job_rows(db: Connection) -> list[Any]:
    """Every column of every job, to prove that a call changed nothing."""
    return db.execute("select * from upload_pipeline.upload_jobs order by seq").fetchall()


def lane_ready(db: Connection, user: UUID, pool: str = "default") -> bool:
    """Whether a user's lane says that it has jobs to claim."""
    return bool(
        value(db, "select ready from upload_pipeline.lanes where pool = %s and user_id = %s", pool, user),
    )


def event_codes(db: Connection, job: UUID) -> list[str]:
    """A job's history, oldest first."""
    rows = db.execute("select code from upload_pipeline.events where job_id = %s order by event_id", [job]).fetchall()
    return [row.code for row in rows]


def in_background(call: Callable[..., T], *arguments: Any, **options: Any) -> Future[T]:
    """Runs a call in a thread of its own; its result, or its error, is the future's."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def await_lock_wait(admin: Connection, blocked: Connection) -> None:
    """Returns once that connection's backend waits for a lock; fails where it does not within 10 s."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        kind = value(
            admin, "select wait_event_type from pg_catalog.pg_stat_activity where pid = %s", blocked.info.backend_pid
        )
        if kind == "Lock":
            return
        time.sleep(0.005)
    raise AssertionError("the statement never waited for a lock")


def terminate(admin: Connection, victim: Connection) -> None:
    """Cuts a connection as a crash does: its transaction is rolled back, and the backend is gone when this returns."""
    pid = victim.info.backend_pid
    admin.execute("select pg_terminate_backend(%s)", [pid])
    deadline = time.monotonic() + 10
    while value(admin, "select count(*) from pg_catalog.pg_stat_activity where pid = %s", pid):
        assert time.monotonic() < deadline, "the backend did not end"
        time.sleep(0.005)


def sqlstate(error: pytest.ExceptionInfo[psycopg.Error]) -> str | None:
    """The SQLSTATE of what was raised."""
    return error.value.sqlstate
