"""Detection in photos: what a step reads before it asks, and the verbs of `sql/schema/05_photo_detection.sql`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upload_pipeline.database.queue import Transition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta
    from uuid import UUID

    from upload_pipeline.database.queue import Executor, Lease


@dataclass(frozen=True, slots=True)
class SentMessage:
    """A message that a model took and has not answered.

    Attributes:
        delivery_id: the same for each delivery of it.
        attempt: the number of the last delivery, from 1.
        retry_count: the job's at that delivery.
        left: until the answer has to be there, by the database's clock; negative once that is over.
    """

    delivery_id: UUID
    attempt: int
    retry_count: int
    left: timedelta


@dataclass(frozen=True, slots=True)
class DetectionTurn:
    """Where a photo's detection stands.

    Attributes:
        waited: since its job came to the stage, by the database's clock.
        sent: None where no message is unanswered.
        answered: delivery id of the message that was answered last; None where none was, or another was sent since.
    """

    waited: timedelta
    sent: SentMessage | None
    answered: UUID | None


async def load_turn(db: Executor, *, job_id: UUID, photo_id: UUID) -> DetectionTurn:
    """Where a photo's detection stands."""
    row = await db.fetchrow(
        """
        select r.delivery_id, r.attempt, r.retry_count, r.expires_at - upload_pipeline.now() as left,
               r.answered_at is not null as answered,
               upload_pipeline.now() - coalesce(
                 (select max(e.at) from upload_pipeline.events e
                   where e.job_id = j.job_id and e.stage = 'detecting'
                     and e.code in ('job_advanced', 'job_handed_on', 'job_restarted')), j.created_at) as waited
          from upload_pipeline.upload_jobs j
          left join upload_pipeline.photo_detection_requests r on r.photo_id = $2
         where j.job_id = $1
        """,
        job_id,
        photo_id,
    )
    if row["answered"] or row["delivery_id"] is None:
        return DetectionTurn(row["waited"], None, row["delivery_id"])
    sent = SentMessage(row["delivery_id"], row["attempt"], row["retry_count"], row["left"])
    return DetectionTurn(row["waited"], sent, None)


async def commit_detections(
    db: Executor,
    lease: Lease,
    *,
    detector: str,
    detections: Sequence[Mapping[str, Any]] | None,
    keep: bool,
    ttl: timedelta,
) -> Transition:
    """Stores what was found and ends the photo's job.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP001 where the lease is lost.
    """
    row = await db.fetchrow(
        """
        select job_id, stage, state::text as state
          from upload_pipeline.commit_detections($1, $2, $3, $4, p_keep => $5, p_ttl => $6)
        """,
        lease.job_id,
        lease.token,
        detector,
        None if detections is None else json.dumps(detections, allow_nan=False),
        keep,
        ttl,
    )
    return Transition(**row)


async def await_detections(
    db: Executor, lease: Lease, *, delivery_id: UUID, attempt: int, wait: timedelta, keep: bool, ttl: timedelta
) -> Transition:
    """Notes that a model took a message, and gives the job back until its answer has to be there.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP001 where the lease is lost, but for an answer that was here first.
    """
    del keep, ttl  # the lease is let go whatever the worker does next
    row = await db.fetchrow(
        """
        select job_id, stage, state::text as state
          from upload_pipeline.await_detections($1, $2, $3, $4, $5)
        """,
        lease.job_id,
        lease.token,
        delivery_id,
        attempt,
        wait,
    )
    return Transition(**row)


async def detection_types_of(db: Executor, photo_id: UUID) -> tuple[str, ...] | None:
    """What a photo is to be looked at for; None where there is no such photo."""
    types = await db.fetchval(
        "select detection_types from upload_pipeline.photos where photo_id = $1 and deleted_at is null", photo_id
    )
    return None if types is None else tuple(types)


async def answer_detections(
    db: Executor,
    photo_id: UUID,
    *,
    detections: Sequence[Mapping[str, Any]] | None,
    error: str | None,
    answer_sha256: str,
) -> bool:
    """Ends a photo's job by a model's answer: detections, or an error. False where this answer was given before.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 where there is no such photo, UP003 where it awaits no answer.
    """
    return bool(
        await db.fetchval(
            "select upload_pipeline.answer_detections($1, $2, $3, $4)",
            photo_id,
            None if detections is None else json.dumps(detections, allow_nan=False),
            error,
            answer_sha256,
        )
    )
