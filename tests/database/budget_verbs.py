"""The verbs of one budget as the tests call them, at a clock of their own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
from sessions import Connection
from verbs import EPOCH, value

from upload_pipeline.database.provider_budget import Granted, Wait, reserve, settle
from upload_pipeline.rate_headers import RateLimits

KEY = {"provider": "hosted", "key_id": "0123456789abcdef", "model": "m"}


async def at(db: asyncpg.Connection, seconds: float) -> None:
    await db.execute(f"set upload_pipeline.now = '{(EPOCH + timedelta(seconds=seconds)).isoformat()}'")


async def ask(db: Any, tokens: int = 0, requests: int = 1, **options: Any) -> Granted | Wait:
    return await reserve(db, **KEY, requests=requests, tokens=tokens, **options)


async def grant(db: Any, tokens: int = 0, **options: Any) -> UUID:
    answer = await ask(db, tokens, **options)
    assert isinstance(answer, Granted), answer
    return answer.reservation_id


async def refuse(db: Any, tokens: int = 0, **options: Any) -> Wait:
    answer = await ask(db, tokens, **options)
    assert isinstance(answer, Wait), answer
    return answer


async def told(db: Any, limits: RateLimits) -> None:
    """One call has found the limits out, so long ago that it counts no more."""
    await at(db, -1000)
    assert await settle(db, await grant(db), limits=limits)
    await at(db, 0)


def sums_are_those_of_the_rows(admin: Connection) -> bool:
    return bool(
        value(
            admin,
            """
            select bool_and((b.calls, b.tokens) = (
                     select coalesce(sum(r.calls), 0), coalesce(sum(r.tokens), 0)
                       from upload_pipeline.provider_reservations r
                      where r.budget_id = b.budget_id and r.granted_at is not null))
              from upload_pipeline.provider_budgets b
            """,
        )
    )
