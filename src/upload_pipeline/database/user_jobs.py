"""Jobs and their events as their owner asks for them.

All run on a connection that `as_user` has made the user's, so row-level security decides what there is; the one that
does not says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Where a job stands.

    Attributes:
        document_id: what it is about; None where that is a photo, and the other way round.
        progress: percent.
        queued_ahead: jobs that are claimed before this one; None once it has ended.
        estimated_completion_at: when it should be done; None once it has ended.
        results: what it came to; None before its end.
        error: `code`, `message` and `details` of the last failure; None where there was none, or where it is mended.
    """

    job_id: UUID
    document_id: UUID | None
    photo_id: UUID | None
    pipeline: str
    stage: str
    state: str
    progress: int
    retry_count: int
    queued_ahead: int | None
    estimated_completion_at: datetime | None
    results: dict[str, Any] | None
    error: dict[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    updated_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a list shows; None does not restrict.

    Attributes:
        batch_id: jobs of this batch.
        created_from: this moment or later.
        created_to: before this moment.
    """

    state: str | None = None
    stage: str | None = None
    pipeline: str | None = None
    batch_id: UUID | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's history.

    Attributes:
        event_id: grows along a job's history in the order in which its events became visible.
        progress: percent that the stage stands for; None for an event without a stage.
        details: what the event tells beside its code.
    """

    event_id: int
    at: datetime
    code: str
    severity: str
    stage: str | None
    progress: int | None
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobNews:
    """What one look found of one job.

    Attributes:
        finished: whether the job has ended, or is gone, with `events` told.
        state: the job's; None where it is gone.
    """

    job_id: UUID
    finished: bool
    state: str | None
    events: tuple[JobEvent, ...]


@dataclass(frozen=True, slots=True)
class News:
    """What one look found.

    Attributes:
        jobs: those that have ended or have news.
        oldest_running: every transaction with a smaller id had ended, and the look has seen what it wrote.
    """

    jobs: list[JobNews]
    oldest_running: int


# One call estimates for the whole page. Whether a document or a photo is being deleted is for its policy to say.
_STATUS = """
with page as materialized ({page})
select p.job_id, p.document_id, p.photo_id, p.pipeline, p.stage, p.state::text as state,
       coalesce(e.progress, s.progress::integer) as progress, p.retry_count::integer as retry_count, e.queued_ahead,
       e.estimated_completion_at, o.results, o.error_code, o.error_message, o.error_details, p.created_at,
       p.started_at, p.updated_at, p.finished_at
  from page p
  join upload_pipeline.stages s on s.pipeline = p.pipeline and s.stage = p.stage
  left join upload_pipeline.job_outcomes o on o.job_id = p.job_id
  left join upload_pipeline.estimate_jobs(
              array(select l.job_id from page l where l.finished_at is null), {seconds}) e on e.job_id = p.job_id
 order by p.created_at desc, p.job_id
"""

_OF_SOMETHING_SEEN = """
  select j.* from upload_pipeline.upload_jobs j
    left join upload_pipeline.documents d on d.document_id = j.document_id
    left join upload_pipeline.photos f on f.photo_id = j.photo_id
   where (d.document_id is not null or f.photo_id is not null)
"""

_ONE = _STATUS.format(seconds="$2", page=_OF_SOMETHING_SEEN + "and j.job_id = $1")

# The first bound is always there, so that a plan for any parameters, which Postgres may settle on at the sixth call,
# begins in the index where the page begins. As `case` and not as `coalesce`, which is not taken for leakproof and so
# would be asked only behind row-level security, of each row.
_SELECTED = (
    _OF_SOMETHING_SEEN
    + """
     and ($3::text is null or j.state = $3::text::upload_pipeline.job_state)
     and ($4::text is null or j.stage = $4)
     and ($5::text is null or j.pipeline = $5)
     and ($6::timestamptz is null or j.created_at >= $6)
     and ($7::timestamptz is null or j.created_at < $7)
     and j.created_at <= case when $8::timestamptz is null then 'infinity' else $8 end
     and ($8::timestamptz is null or j.created_at < $8 or j.job_id > $9){batch}
   order by j.created_at desc, j.job_id
   limit $1
"""
)

# A batch has few jobs: they are looked up by their ids, however many others the user has.
_IN_BATCH = """
     and j.job_id = any (array(select m.job_id from upload_pipeline.batch_members m where m.batch_id = $10))
"""

_PAGE = _STATUS.format(seconds="$2", page=_SELECTED.format(batch=""))
_BATCH_PAGE = _STATUS.format(seconds="$2", page=_SELECTED.format(batch=_IN_BATCH))

_EVENT_COLUMNS = """
e.event_id, e.at, e.code::text as code, e.severity::text as severity, e.stage, e.payload,
       (select s.progress::integer from upload_pipeline.stages s
          join upload_pipeline.upload_jobs j on j.pipeline = s.pipeline
         where j.job_id = e.job_id and s.stage = e.stage) as progress
"""

_EVENTS = f"""
select {_EVENT_COLUMNS}
  from upload_pipeline.events e
 where e.job_id = $1 and e.event_id > $2
 order by e.event_id
 limit $3
"""  # noqa: S608 - the columns are a constant

_NEWS = f"""
select pg_snapshot_xmin(pg_current_snapshot())::text::bigint as oldest_running, f.*
  from (select) s
  left join (
    select w.job_id as watched, j.state::text as job_state,
           j.job_id is null or j.finished_at is not null as finished, n.*
      from unnest($1::uuid[], $2::bigint[]) w (job_id, after)
      left join lateral (select u.job_id, u.state, u.finished_at from upload_pipeline.upload_jobs u
                          where u.job_id = w.job_id) j on true
      left join lateral (
        select {_EVENT_COLUMNS}
          from upload_pipeline.events e
         where e.job_id = w.job_id and e.event_id > w.after
         order by e.event_id limit $3) n on true
     where n.event_id is not null or j.job_id is null or j.finished_at is not null) f on true
 order by f.watched, f.event_id
"""  # noqa: S608 - the columns are a constant


async def find_job(connection: Executor, job_id: UUID, *, default_seconds: float) -> JobStatus | None:
    """A job of the user, or None.

    Args:
        connection: the user's.
        job_id: of the job.
        default_seconds: what a whole document is taken to need where there is no history.
    """
    row = await connection.fetchrow(_ONE, job_id, default_seconds)
    return _status(row) if row else None


async def list_jobs(
    connection: Executor,
    wanted: JobFilter,
    *,
    limit: int,
    before: tuple[datetime, UUID] | None,
    default_seconds: float,
) -> list[JobStatus]:
    """The user's jobs, newest first.

    Args:
        connection: the user's.
        wanted: which ones.
        limit: at most so many.
        before: creation time and id of the last job of the page before.
        default_seconds: as for `find_job`.
    """
    rows = await connection.fetch(
        _PAGE if wanted.batch_id is None else _BATCH_PAGE,
        limit,
        default_seconds,
        wanted.state,
        wanted.stage,
        wanted.pipeline,
        wanted.created_from,
        wanted.created_to,
        *(before or (None, None)),
        *(() if wanted.batch_id is None else (wanted.batch_id,)),
    )
    return [_status(row) for row in rows]


async def last_event_id(connection: Executor, job_id: UUID) -> int | None:
    """The id of a job's newest event, 0 where it has none; None where the user has no such job."""
    newest: int | None = await connection.fetchval(
        """
        select coalesce((select max(e.event_id) from upload_pipeline.events e where e.job_id = j.job_id), 0)
          from upload_pipeline.upload_jobs j
          left join upload_pipeline.documents d on d.document_id = j.document_id
          left join upload_pipeline.photos f on f.photo_id = j.photo_id
         where j.job_id = $1 and (d.document_id is not null or f.photo_id is not null)
        """,
        job_id,
    )
    return newest


async def list_events(connection: Executor, job_id: UUID, *, after: int, limit: int) -> list[JobEvent]:
    """A job's events behind the one with id `after`, oldest first."""
    return [_event(row) for row in await connection.fetch(_EVENTS, job_id, after, limit)]


async def job_news(db: Executor, watched: Mapping[UUID, int], *, limit: int) -> News:
    """Those of some jobs that have ended or have events behind a given id; one statement, so one moment.

    The one query here that runs as `upload_worker`: who may watch a job is asked when the watching begins.

    A verb draws an event's id while it holds the job's row, so of one job a smaller id never becomes visible after a
    larger one, and `after` leaves no gap.

    Args:
        db: of role `upload_worker`.
        watched: for each job the id of the last event that is known.
        limit: most events of one job.
    """
    found: dict[UUID, tuple[bool, str | None, list[JobEvent]]] = {}
    oldest_running = 0
    for row in await db.fetch(_NEWS, list(watched), list(watched.values()), limit):
        oldest_running = row["oldest_running"]
        if row["watched"] is None:
            continue
        _, _, events = found.setdefault(row["watched"], (row["finished"], row["job_state"], []))
        if row["event_id"] is not None:
            events.append(_event(row))
    jobs = [
        JobNews(job_id, finished and len(events) < limit, state, tuple(events))
        for job_id, (finished, state, events) in found.items()
    ]
    return News(jobs, oldest_running)


def _status(row: Any) -> JobStatus:
    fields = dict(row)
    code, message = fields.pop("error_code"), fields.pop("error_message")
    details = fields.pop("error_details")
    error = None
    if code is not None and fields["state"] != "done":
        error = {"code": code, "message": message, "details": json.loads(details) if details else {}}
    results = fields.pop("results")
    return JobStatus(**fields, results=json.loads(results) if results else None, error=error)


def _event(row: Any) -> JobEvent:
    return JobEvent(
        row["event_id"],
        row["at"],
        row["code"],
        row["severity"],
        row["stage"],
        row["progress"],
        json.loads(row["payload"]) if row["payload"] else {},
    )
