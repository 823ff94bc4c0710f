"""What was used of the providers: recorded by workers, searches, `models add` and `doctor`, and read by operators."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from psycopg.rows import class_row
from psycopg.sql import SQL

from upload_pipeline.prices import PriceTable, cost_micros

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class Usage:
    """What one call used, or that part of it that one job is answerable for.

    Attributes:
        usage_id: names it. Recorded again under the same id, it counts once: make it before the first try.
        provider: as in the setting's `<provider>/<model>`.
        operation: `parse`, `embed`, `search`, `detect`, or `trial` where an operator tries a model.
        job_id: the job that asked; its user and document are then the record's. None: nobody's job.
        requests: calls; the whole call stands in one of its parts.
        tokens: that the provider counted.
        pages: that the provider counted.
        credits: that the provider took.
        cached: texts or pages that needed no call.
    """

    usage_id: UUID
    provider: str
    model: str
    operation: str
    job_id: UUID | None = None
    document_id: UUID | None = None
    user_id: UUID | None = None
    requests: int = 0
    tokens: int = 0
    pages: int = 0
    credits: Decimal = Decimal(0)
    cached: int = 0


async def record_usage(db: Executor, used: Sequence[Usage], prices: PriceTable) -> int:
    """Records usage at today's prices; one statement. Safe to repeat. A job that has ended gets its cost anew.

    Args:
        db: as role `upload_worker`.
        used: any number; none costs no statement.
        prices: the setting `prices`.

    Returns:
        How many of them were not there before.
    """
    if not used:
        return 0
    records = [_record(one, prices) for one in used]
    return int(await db.fetchval("select upload_pipeline.record_usage($1)", json.dumps(records, default=str)))


def _record(used: Usage, prices: PriceTable) -> dict[str, Any]:
    cost = cost_micros(
        prices,
        provider=used.provider,
        model=used.model,
        tokens=used.tokens,
        pages=used.pages,
        credits_taken=used.credits,
        requests=used.requests,
    )
    return {**asdict(used), "cost_micros": cost}


Grouping = Literal["day", "model", "user"]

_KEYS: dict[Grouping, SQL] = {
    "day": SQL("(r.at at time zone 'UTC')::date::text"),
    "model": SQL("r.provider || '/' || r.model"),
    "user": SQL("coalesce(r.user_id::text, '')"),
}


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Usage of a day (UTC), a model or a user.

    Attributes:
        key: the day, `<provider>/<model>`, or the user's id; empty for usage that is nobody's, or nobody's any more.
        cost_usd: of what has a price; None where nothing has.
        unpriced: records without a price: the cost lacks theirs.
    """

    key: str
    requests: int
    tokens: int
    pages: int
    credits: Decimal
    cached: int
    cost_usd: Decimal | None
    unpriced: int


def sum_usage(
    connection: Connection[Any],
    *,
    by: Grouping,
    user_id: UUID | None = None,
    begin: datetime | None = None,
    end: datetime | None = None,
    limit: int = 1000,
) -> list[UsageSum]:
    """Usage from `begin` on and before `end`, summed.

    Returns:
        The latest days first; models and users by cost, then by tokens and pages, the largest first.
    """
    order = SQL("1 desc") if by == "day" else SQL("sum(r.cost_micros) desc nulls last, sum(r.tokens + r.pages) desc, 1")
    query = SQL(
        """
        select {key} as key, sum(r.requests)::bigint as requests, sum(r.tokens)::bigint as tokens,
               sum(r.pages)::bigint as pages, trim_scale(sum(r.credits)) as credits, sum(r.cached)::bigint as cached,
               trim_scale(sum(r.cost_micros) / 1000000) as cost_usd, count(*) - count(r.cost_micros) as unpriced
          from upload_pipeline.usage_records r
         where (%(user)s::uuid is null or r.user_id = %(user)s)
           and (%(begin)s::timestamptz is null or r.at >= %(begin)s)
           and (%(end)s::timestamptz is null or r.at < %(end)s)
         group by 1
         order by {order}
         limit %(limit)s
        """
    ).format(key=_KEYS[by], order=order)
    with connection.cursor(row_factory=class_row(UsageSum)) as cursor:
        return cursor.execute(query, {"user": user_id, "begin": begin, "end": end, "limit": limit}).fetchall()
