"""Lanes: how many jobs of a user a pool may have at work at once, and how many it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from psycopg import Connection


@dataclass(frozen=True, slots=True)
class Lane:
    """One user in one pool.

    Attributes:
        working: how many jobs are at work now.
        ready: whether jobs wait there, as far as claims know.
    """

    pool: str
    user_id: UUID
    max_in_flight: int
    working: int
    ready: bool


def set_lane_cap(connection: Connection[Any], *, user_id: UUID, pool: str, max_in_flight: int) -> None:
    """Sets how many jobs of a user a pool may have at work at once; running ones run on.

    Raises:
        PipelineError: `INVALID_ARGUMENT` where no stage has that pool, or the database does not take the user.
    """
    pools = [row[0] for row in connection.execute("select distinct pool from upload_pipeline.stages order by pool")]
    if pool not in pools:
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            f"No stage has the pool {pool!r}. The pools are: {', '.join(pools)}.",
            {"pool": pool, "pools": pools},
        )
    try:
        connection.execute("select upload_pipeline.set_lane_cap(%s, %s, %s)", [user_id, pool, max_in_flight])
    except psycopg.errors.CheckViolation as error:
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT, "A cap needs a user who is not the nil UUID, and is at least 1."
        ) from error


def list_lanes(connection: Connection[Any], *, user_id: UUID | None, limit: int) -> list[Lane]:
    """Lanes by pool and user; of one user where one is named."""
    with connection.cursor(row_factory=class_row(Lane)) as cursor:
        return cursor.execute(
            """
            select l.pool, l.user_id, l.max_in_flight, w.working, l.ready
              from upload_pipeline.lanes l
             cross join lateral (
               select count(*)::integer as working from upload_pipeline.upload_jobs j
                where j.pool = l.pool and j.user_id = l.user_id and j.state = 'working') w
             where %(user)s::uuid is null or l.user_id = %(user)s::uuid
             order by l.pool, l.user_id limit %(limit)s
            """,
            {"user": user_id, "limit": limit},
        ).fetchall()
