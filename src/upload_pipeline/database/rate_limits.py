"""Token buckets in Postgres, shared by all processes of the HTTP service."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of tokens that fills up evenly.

    Attributes:
        name: unique among all buckets, at most 500 characters.
        limit: tokens when it is full, 1 or more.
        period: in which an empty one fills up.
    """

    name: str
    limit: int
    period: timedelta


@dataclass(frozen=True, slots=True)
class BucketState:
    """A bucket after a call.

    Attributes:
        allowed: whether it had a token.
        limit: tokens when it is full.
        remaining: tokens left.
        retry_after: seconds until it has one; 0 where it had.
        full_at: when it is full again.
    """

    allowed: bool
    limit: int
    remaining: int
    retry_after: float
    full_at: datetime


async def take_tokens(db: Executor, buckets: Sequence[Bucket]) -> list[BucketState]:
    """Takes one token from each bucket, or none where one is empty; atomic, one round trip.

    Args:
        db: as role `upload_worker`.
        buckets: each name once.

    Returns:
        The buckets in the order asked; all of them allowed, or some not and nothing taken.
    """
    rows = await db.fetch(
        "select * from upload_pipeline.take_tokens($1, $2, $3)",
        [bucket.name for bucket in buckets],
        [bucket.limit for bucket in buckets],
        [bucket.period for bucket in buckets],
    )
    return [
        BucketState(row["allowed"], bucket.limit, row["remaining"], row["retry_after"], row["full_at"])
        for bucket, row in zip(buckets, rows, strict=True)
    ]


async def pour_buckets(db: Executor, pairs: Sequence[tuple[Bucket, Bucket]]) -> None:
    """Counts what was taken from the first bucket of each pair for the second one instead, down to none left.

    Doing it twice is doing it once: the first bucket is full after.

    Args:
        db: as role `upload_worker`.
        pairs: of the same limit and period each.
    """
    await db.fetchval(
        "select upload_pipeline.pour_buckets($1, $2, $3)",
        [source.name for source, _ in pairs],
        [target.name for _, target in pairs],
        [target.period for _, target in pairs],
    )


async def forget_full_buckets(db: Executor) -> int:
    """Removes rows of buckets that are full, 10,000 at most; how many."""
    return int(await db.fetchval("select upload_pipeline.forget_full_buckets()"))


async def count_open_jobs(db: Executor, user_id: UUID, limit: int) -> int:
    """How many jobs of a user have not ended; counted to `limit` at most."""
    return int(await db.fetchval("select upload_pipeline.count_open_jobs($1, $2)", user_id, limit))
