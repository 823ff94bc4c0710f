"""The budget of a hosted provider's key and model, kept in Postgres and shared by all processes.

Before each call: `reserve`, or `reserve_in_turn`, which also waits. After it, whatever came of it: `settle`. Why no
window of a minute, or of another period, ever holds more than the limit is told in
`sql/schema/06_provider_budget.sql`; of the caller it asks that what it reserves is no less than what the provider will
count, and that a call is over before its grant is.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg

from upload_pipeline.database.queue import NOT_WHOLE
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.rate_headers import RateLimits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from upload_pipeline.database.queue import Executor

RESERVATION_LIFE = timedelta(minutes=2)
"""In which a call must be over unless another time is asked for."""

MINUTE = timedelta(minutes=1)
"""In which providers count, but for the few that have shorter periods too."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The call may be made.

    Attributes:
        seconds: in which it must be over: its timeout is no longer than this.
    """

    reservation_id: UUID
    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """The call may not be made yet.

    Attributes:
        seconds: after which to ask again, with the same id, which keeps the place in line.
    """

    reservation_id: UUID
    seconds: float


async def reserve(
    db: Executor,
    *,
    provider: str,
    key_id: str,
    model: str,
    requests: int,
    tokens: int,
    reservation_id: UUID | None = None,
    request_limit: int | None = None,
    token_limit: int | None = None,
    life: timedelta = RESERVATION_LIFE,
    period: timedelta = MINUTE,
) -> Granted | Wait:
    """Asks for a call, once; one round trip. Asking again with the same id is answered the same once it was granted.

    Args:
        db: as role `upload_worker`, not inside a transaction: the answer holds when it is committed.
        key_id: as `rate_headers.key_id_of` makes it.
        requests: calls that are made; 1 but for rare cases.
        tokens: no less than what the provider will count; 0 where it counts none.
        reservation_id: of the call that is asked for again.
        request_limit: what is allowed in a period, where that is less than the provider allows or tells; None: no less.
        token_limit: the same for tokens.
        life: how long the call may take.
        period: in which the limits hold; the same for all calls of a model.

    Raises:
        PipelineError: `REQUEST_OVER_BUDGET` where a whole minute does not hold it, so that waiting is no use.
    """
    reservation_id = reservation_id or uuid4()
    try:
        row = await db.fetchrow(
            "select granted, seconds from upload_pipeline.reserve_calls($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            reservation_id,
            provider,
            key_id,
            model,
            requests,
            tokens,
            request_limit,
            token_limit,
            life,
            period,
        )
    except asyncpg.PostgresError as error:
        if error.sqlstate != NOT_WHOLE:
            raise
        raise PipelineError(
            ErrorCode.REQUEST_OVER_BUDGET,
            f"{error.args[0]}. Send it in smaller parts, or ask {provider} for a higher limit.",
            {"provider": provider, "model": model, "requests": requests, "tokens": tokens},
        ) from error
    return (Granted if row["granted"] else Wait)(reservation_id, row["seconds"])


async def reserve_in_turn(
    db: Executor,
    *,
    provider: str,
    key_id: str,
    model: str,
    requests: int,
    tokens: int,
    longest: float,
    reservation_id: UUID | None = None,
    keep_place: bool = False,
    request_limit: int | None = None,
    token_limit: int | None = None,
    life: timedelta = RESERVATION_LIFE,
    period: timedelta = MINUTE,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Granted | Wait:
    """Asks and waits until the call is granted; nobody who asked later is granted what it needs meanwhile.

    Args:
        longest: seconds to wait at most; where more are needed the place in line is given up.
        reservation_id: whose place is taken up again, also with other numbers; a new one where it is None.
        keep_place: leave the place in line, for who comes back with its id within 15 s of the time told.

    Returns:
        The grant; or a `Wait` that tells how long it would still have been.

    Raises:
        PipelineError: `REQUEST_OVER_BUDGET` where a whole period does not hold it.
    """
    deadline = clock() + longest
    reservation_id = reservation_id or uuid4()
    while True:
        answer = await reserve(
            db,
            provider=provider,
            key_id=key_id,
            model=model,
            requests=requests,
            tokens=tokens,
            reservation_id=reservation_id,
            request_limit=request_limit,
            token_limit=token_limit,
            life=life,
            period=period,
        )
        if isinstance(answer, Granted):
            return answer
        if clock() + answer.seconds > deadline:
            if not keep_place:
                await release(db, reservation_id)
            return answer
        await sleep(answer.seconds)


async def settle(
    db: Executor,
    reservation_id: UUID,
    *,
    tokens: int | None = None,
    limits: RateLimits | None = None,
) -> bool:
    """Says that a call has ended: it counts for another period. Safe to repeat.

    Args:
        tokens: what the provider counted; None where nobody knows, then what was reserved.
        limits: what a good answer told, also where that is nothing; of a failure only where it told something. None
            where there was no answer: a provider whose limits are not known yet is then asked by one call at a time.

    Returns:
        False where the reservation ran out before and is gone.
    """
    told = limits or RateLimits()
    return bool(
        await db.fetchval(
            "select upload_pipeline.settle_calls($1, null, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            reservation_id,
            tokens,
            limits is not None,
            told.requests,
            told.requests_remaining,
            told.requests_reset,
            told.tokens,
            told.tokens_remaining,
            told.tokens_reset,
            told.retry_after,
        )
    )


async def release(db: Executor, reservation_id: UUID) -> bool:
    """Gives back a call that was surely never sent, or a place in line. Safe to repeat."""
    return bool(await db.fetchval("select upload_pipeline.settle_calls($1, 0, 0)", reservation_id))


async def freeze(db: Executor, *, provider: str, key_id: str, model: str, seconds: float) -> None:
    """Lets nobody begin a call for so many seconds from now, by the database's clock; an end that is later stays."""
    await db.fetchval("select upload_pipeline.freeze_budget($1, $2, $3, $4)", provider, key_id, model, seconds)


async def pause(
    db: Executor, *, provider: str, key_id: str, model: str, seconds: float, code: str, message: str
) -> bool:
    """Stops a provider for all processes and writes one alarm (`provider_paused`); false where another has done so.

    Args:
        seconds: until it is asked again.
        code: why, as an error code.
        message: why, for a person.
    """
    return bool(
        await db.fetchval(
            "select upload_pipeline.pause_provider($1, $2, $3, $4, $5, $6)",
            provider,
            key_id,
            model,
            seconds,
            code,
            message,
        )
    )


async def pause_left(db: Executor, *, provider: str, key_id: str, model: str) -> float:
    """Seconds that a provider is paused for yet; 0 where it is not."""
    seconds: float | None = await db.fetchval(
        """
        select extract(epoch from least(frozen_until, paused_until) - upload_pipeline.now())::double precision
          from upload_pipeline.provider_budgets
         where provider = $1 and key_id = $2 and model = $3 and frozen_until is not null and paused_until is not null
        """,
        provider,
        key_id,
        model,
    )
    return max(0.0, seconds or 0.0)
