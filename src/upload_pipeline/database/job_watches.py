"""Which jobs a process watches, so that it is notified of their news.

One function for each SQL function of `sql/schema/06_watches.sql`, which tells how the notifications come about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import timedelta

    from upload_pipeline.database.queue import Executor

EVENT_CHANNEL = "upload_pipeline_events"
"""Where `notify_watchers` notifies; the payload is ids of jobs, comma-separated."""


async def watch_jobs(db: Executor, watcher_id: UUID, job_ids: Collection[UUID], *, ttl: timedelta) -> None:
    """Begins to watch jobs, or goes on, for `ttl` from now."""
    await db.fetchval("select upload_pipeline.watch_jobs($1, $2, $3)", watcher_id, list(job_ids), ttl)


async def unwatch_jobs(db: Executor, watcher_id: UUID, job_ids: Collection[UUID] | None = None) -> None:
    """Watches jobs no more; all of this watcher where none are named."""
    await db.fetchval(
        "select upload_pipeline.unwatch_jobs($1, $2)", watcher_id, None if job_ids is None else list(job_ids)
    )


async def forget_lost_watches(db: Executor) -> int:
    """Removes watches of processes that were killed; how many."""
    return int(await db.fetchval("select upload_pipeline.forget_lost_watches()"))


async def newest_transaction(db: Executor) -> int:
    """An id above that of every transaction that is under way now.

    A transaction that began to write before this call has a smaller one. That of a snapshot would not do: its upper
    bound is the newest transaction that has ended, and some behind it may be under way.
    """
    return int(await db.fetchval("select pg_current_xact_id()::text::bigint"))


def job_ids_of(payload: str) -> set[UUID]:
    """The jobs that a notification names; none where it is no list of ids, since anybody may notify."""
    try:
        return {UUID(part) for part in payload.split(",")}
    except ValueError:
        return set()
