"""What a monitor asks of the queue: depths, the oldest ready job, what has happened since the last look."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor

LAG_SECONDS = 10
"""An event is counted when it is this old: it bears the time at which its transaction began, and is seen once that has
committed."""

MAX_CLAIMS = 5000
"""Claims whose latency one look measures; of more, the latest."""


@dataclass(frozen=True, slots=True)
class Depth:
    """Jobs that have not ended, at one stage and in one state."""

    pipeline: str
    stage: str
    state: str
    jobs: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Happened:
    """What happened between two looks.

    Attributes:
        until: pass this as `since` of the next look.
        events: how many, by code.
        claim_seconds: of each claim, the seconds since the event before it made the job ready.
    """

    until: datetime
    events: dict[str, int]
    claim_seconds: tuple[float, ...]


async def read_depths(db: Executor) -> list[Depth]:
    """How much stands where."""
    rows = await db.fetch(
        """
        select pipeline, stage, state::text, jobs, extract(epoch from now() - oldest)::float8 as oldest_seconds
          from upload_pipeline.queue_depth
        """
    )
    return [Depth(*row) for row in rows]


async def read_happened(db: Executor, since: datetime | None) -> Happened:
    """What happened since the last look; without one, nothing, but a place to start from."""
    until: datetime = await db.fetchval("select now() - make_interval(secs => $1)", float(LAG_SECONDS))
    if since is None or since >= until:
        return Happened(since or until, {}, ())
    rows = await db.fetch(
        """
        select code::text, count(*) as count from upload_pipeline.events
         where at > $1 and at <= $2 group by code
        """,
        since,
        until,
    )
    claims = await db.fetch(
        """
        select extract(epoch from c.at - before.at)::float8
          from (select e.at, e.job_id, e.event_id from upload_pipeline.events e
                 where e.at > $1 and e.at <= $2 and e.code = 'job_claimed' order by e.at desc limit $3) c
         cross join lateral (
           select b.at from upload_pipeline.events b
            where b.job_id = c.job_id and b.event_id < c.event_id order by b.event_id desc limit 1) before
        """,
        since,
        until,
        MAX_CLAIMS,
    )
    return Happened(until, {row["code"]: row["count"] for row in rows}, tuple(max(0.0, row[0]) for row in claims))
