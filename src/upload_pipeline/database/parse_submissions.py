"""Parses by a hosted parser: one function for each SQL function of `sql/schema/05_parsing.sql`, which explains them.

Those that take a lease raise `asyncpg.PostgresError` with SQLSTATE UP001 where it is lost, and then nothing was
written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upload_pipeline.database.queue import Transition

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from upload_pipeline.database.queue import Executor, Lease


@dataclass(frozen=True, slots=True)
class BegunSubmission:
    """The submission that counts for a document.

    Attributes:
        submission_id: what the provider is told.
        tier: another than was asked for only where a call may have made its job and nobody knows.
        parse_id: the provider's id; None while it is not known.
        called_at: when the call began that may have made the job, by the database's clock; None where there was none.
        called_until: when that call was over.
        wait: seconds until another call may be made.
        age: seconds since the id was stored; None while it is not known, and once the result is in the store.
    """

    submission_id: UUID
    tier: str
    version: str
    parse_id: str | None
    called_at: datetime | None
    called_until: datetime | None
    wait: float
    age: float | None


@dataclass(frozen=True, slots=True)
class StoredSubmission:
    """A submission whose job is known.

    Attributes:
        age: seconds since its id was stored, by the database's clock.
        told: whether the provider has said that it has ended.
        finished: whether its result is in the store.
        page_count: of the result; None while there is none.
        failed_pages: their numbers, from 1.
        failed: whether it brings nothing, and another one is to be made.
    """

    submission_id: UUID
    tier: str
    version: str
    parse_id: str
    age: float
    told: bool
    finished: bool
    page_count: int | None
    failed_pages: tuple[int, ...]
    failed: bool


@dataclass(frozen=True, slots=True)
class AbandonedParse:
    """A parse that no job looks at any more, and whose cost is not recorded.

    Attributes:
        job_id: the latest job of its document; None where it has none any more.
        age: seconds since its id was stored.
        page_count: of the document; None where it is not known.
    """

    submission_id: UUID
    parse_id: str
    tier: str
    version: str
    job_id: UUID | None
    age: float
    page_count: int | None


@dataclass(frozen=True, slots=True)
class Wait:
    """How long a submission has been waited for, since it was begun or its provider was paused last, whatever the key.

    Attributes:
        seconds: less than 0 while the provider is paused.
        silence: the same, but at most since the provider answered anybody.
    """

    seconds: float
    silence: float


async def load_submission(db: Executor, *, document_id: UUID, parse_id: str) -> StoredSubmission | None:
    """The submission that a document's row names, or None."""
    row = await db.fetchrow(
        """
        select submission_id, tier, version, parse_id,
               extract(epoch from upload_pipeline.now() - submitted_at)::double precision as age,
               told_at is not null as told, finished_at is not null as finished, page_count, failed_pages,
               failed_at is not null as failed
          from upload_pipeline.parse_submissions
         where document_id = $1 and parse_id = $2
         order by submitted_at desc limit 1
        """,
        document_id,
        parse_id,
    )
    return None if row is None else StoredSubmission(**{**row, "failed_pages": tuple(row["failed_pages"])})


async def begin_submission(
    db: Executor, lease: Lease, *, provider: str, tier: str, version: str, settle: timedelta
) -> BegunSubmission:
    """The submission of the job's document that counts, or a new one.

    Args:
        settle: how long after a call a job that it made may be not listed yet.
    """
    row = await db.fetchrow(
        "select * from upload_pipeline.begin_submission($1, $2, $3, $4, $5, $6)",
        lease.job_id,
        lease.token,
        provider,
        tier,
        version,
        settle,
    )
    return BegunSubmission(**row)


async def load_wait(db: Executor, submission_id: UUID) -> Wait:
    """How long a submission has been waited for."""
    row = await db.fetchrow(
        """
        select extract(epoch from upload_pipeline.now() - t.since)::double precision as seconds,
               extract(epoch from upload_pipeline.now() - greatest(t.since, b.answered_at))::double precision as silence
          from upload_pipeline.parse_submissions s
         cross join lateral (
           select max(p.paused_until) as paused_until, max(p.answered_at) as answered_at
             from upload_pipeline.provider_budgets p where p.provider = s.provider) b
         cross join lateral (select greatest(s.begun_at, b.paused_until) as since) t
         where s.submission_id = $1
        """,
        submission_id,
    )
    return Wait(0.0, 0.0) if row is None else Wait(**row)


async def announce_submission(
    db: Executor, lease: Lease, submission_id: UUID, *, seconds: timedelta, settle: timedelta
) -> bool:
    """Notes that a call which may make the job is over within `seconds`; False where it must not be made now."""
    return bool(
        await db.fetchval(
            "select upload_pipeline.announce_submission($1, $2, $3, $4, $5)",
            lease.job_id,
            lease.token,
            submission_id,
            seconds,
            settle,
        )
    )


async def end_submission_call(db: Executor, lease: Lease, submission_id: UUID, *, made_nothing: bool) -> None:
    """Notes that the call is over, and whether it surely made no job."""
    await db.fetchval(
        "select upload_pipeline.end_submission_call($1, $2, $3, $4)",
        lease.job_id,
        lease.token,
        submission_id,
        made_nothing,
    )


async def commit_submission(
    db: Executor, lease: Lease, *, submission_id: UUID, parse_id: str, keep: bool, ttl: timedelta
) -> Transition:
    """`job_validated` -> `parsing`, together with the provider's id of the parse."""
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_submission($1, $2, $3, $4, $5, $6)",
        lease.job_id,
        lease.token,
        submission_id,
        parse_id,
        keep,
        ttl,
    )
    return Transition(**row)


async def store_submission(db: Executor, lease: Lease, submission_id: UUID, parse_id: str) -> None:
    """The provider's id, for a job that is at `parsing` already."""
    await db.fetchval(
        "select upload_pipeline.store_submission($1, $2, $3, $4)", lease.job_id, lease.token, submission_id, parse_id
    )


async def finish_submission(
    db: Executor, lease: Lease, submission_id: UUID, *, page_count: int, failed_pages: Sequence[int]
) -> None:
    """The result is in the store."""
    await db.fetchval(
        "select upload_pipeline.finish_submission($1, $2, $3, $4, $5)",
        lease.job_id,
        lease.token,
        submission_id,
        page_count,
        list(failed_pages),
    )


async def fail_submission(db: Executor, lease: Lease, submission_id: UUID) -> None:
    """The job brings nothing: the next try makes a new one."""
    await db.fetchval("select upload_pipeline.fail_submission($1, $2, $3)", lease.job_id, lease.token, submission_id)


async def wake_parse(db: Executor, *, provider: str, parse_id: str) -> int:
    """Wakes the jobs that wait for a parse; returns how many they are."""
    return int(await db.fetchval("select upload_pipeline.wake_parse($1, $2)", provider, parse_id))


async def take_abandoned(db: Executor, *, provider: str, limit: int) -> list[AbandonedParse]:
    """Parses whose cost is to be asked for; nobody else is given them for some minutes."""
    rows = await db.fetch("select * from upload_pipeline.take_abandoned_parses($1, $2)", provider, limit)
    return [AbandonedParse(**row) for row in rows]


async def account_submission(db: Executor, submission_id: UUID) -> None:
    """What it cost is recorded, or not to be known."""
    await db.fetchval("select upload_pipeline.account_submission($1)", submission_id)
