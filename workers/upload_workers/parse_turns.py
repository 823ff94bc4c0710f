"""The turns of requests to a hosted parser: within the budgets that all workers share, and not while it is paused.

    a request                                   then
    has to wait longer than PATIENCE            the job is put off (NoRoom)
    met a limit (429)                           the budget is frozen as the answer said; the same
    met an empty account, a refused key         the provider is paused for all workers, with one alarm; put off
    failed in another way                       the error is raised

A job that is put off lets its lease go, and no retry is counted.

The budget is told of a call that has ended, but nothing waits for that long: of one that made a job nothing waits at
all, as the job's id is to be stored before anything else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline.database import provider_budget
from upload_pipeline.providers.llamaparse_results import PROVIDER, ParseError, Remedy
from upload_pipeline.rate_headers import RateLimits
from upload_workers.bounded import bounded
from upload_workers.embedding_line import PutOff
from upload_workers.embedding_requests import PATIENCE, PAUSE_SECONDS

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor
    from upload_pipeline.providers.calls import ProviderCalls

log = structlog.get_logger(__name__)

BUDGET = "requests"
"""The model that the budget is kept under: the account's requests are limited, whatever tier they are of."""

_LIFE_SLACK = timedelta(seconds=10 + PATIENCE)  # between a request's timeout and the end of its first reservation
_UNTOLD_WAIT = 5.0  # seconds, where a 429 says no time


@dataclass(frozen=True, slots=True)
class Limit:
    """Requests that may be made in a period, and the name under which they are counted; None: any number."""

    budget: str
    requests: int | None
    period: timedelta


SHORT_LIMITS = {
    "upload": Limit("uploads in 5 s", 50, timedelta(seconds=5)),
    "submit": Limit("parses in 10 s", 50, timedelta(seconds=10)),
}
"""What LlamaCloud counts apart from the minute, by operation (its documentation: "Rate limits")."""


class NoRoom(PutOff):
    """A limit on requests, ours or the provider's, leaves no room now; also while the provider is paused."""


@dataclass(frozen=True, slots=True)
class ParseTurns:
    """Of one key; used by the tasks of one worker.

    Attributes:
        key_id: as `rate_headers.key_id_of` makes it.
        request_limit: in a minute, of all workers; None: no limit but the provider's.
    """

    db: Executor
    calls: ProviderCalls
    key_id: str
    request_limit: int | None
    _settling: set[asyncio.Task[None]] = field(default_factory=set, init=False, compare=False)

    @asynccontextmanager
    async def __call__(self, operation: str, seconds: float) -> AsyncIterator[None]:
        """One request, which takes `seconds` at most.

        Raises:
            NoRoom: not now.
            PutOff: not now; the provider is paused.
            ParseError: what helps is `AGAIN` or `NEVER`.
        """
        reserved = await self._reserve(operation, timedelta(seconds=seconds) + _LIFE_SLACK)
        limits: RateLimits | None = None
        made = False
        try:
            with self.calls.measured(PROVIDER, operation):
                yield
            limits = RateLimits()
            made = operation == "submit"
        except ParseError as error:
            wait = error.retry_after
            if error.remedy is Remedy.WAIT:
                wait = _UNTOLD_WAIT if wait is None else wait
            if wait is not None:
                limits = RateLimits(retry_after=wait)
            if error.remedy is Remedy.PAUSE:
                await self._pause(error)
                raise put_off(PAUSE_SECONDS) from error
            if error.remedy is Remedy.WAIT:
                raise NoRoom(_later(wait or 0.0)) from error
            raise
        finally:
            settling = asyncio.create_task(self._settle(reserved, limits))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            if not made:
                await settling

    async def close(self) -> None:
        """Waits until the budget is told of all that has ended, though not for long."""
        await asyncio.gather(*self._settling, return_exceptions=True)

    async def _reserve(self, operation: str, life: timedelta) -> list[UUID]:
        """In each period that the request counts in: all, or none.

        The minute last: a refusal or a pause that came while the other was waited for freezes it, and is met here.
        """
        minute = Limit(BUDGET, self.request_limit, provider_budget.MINUTE)
        short = SHORT_LIMITS.get(operation)
        reserved: list[UUID] = []
        for limit in [short, minute] if short and not _implies(minute, short) else [minute]:
            granted = await provider_budget.reserve_in_turn(
                self.db,
                provider=PROVIDER,
                key_id=self.key_id,
                model=limit.budget,
                requests=1,
                tokens=0,
                longest=PATIENCE,
                request_limit=limit.requests,
                life=life,
                period=limit.period,
            )
            if isinstance(granted, provider_budget.Wait):
                for reservation_id in reserved:
                    await provider_budget.release(self.db, reservation_id)
                raise NoRoom(_later(granted.seconds))
            reserved.append(granted.reservation_id)
        return reserved

    async def _settle(self, reserved: list[UUID], limits: RateLimits | None) -> None:
        """What was reserved counts until its end where this cannot be written; the answer is worth more."""
        try:
            for reservation_id in reserved:
                told = limits if reservation_id == reserved[-1] else None  # an answer tells of the minute
                await bounded(provider_budget.settle(self.db, reservation_id, limits=told), PATIENCE)
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("budget_not_settled", error=str(error) or type(error).__name__)

    async def _pause(self, error: ParseError) -> None:
        log.error("provider_paused", provider=PROVIDER, code=error.code.value, error=error.message)
        try:
            await provider_budget.pause(
                self.db,
                provider=PROVIDER,
                key_id=self.key_id,
                model=BUDGET,
                seconds=PAUSE_SECONDS,
                code=error.code.value,
                message=error.message,
            )
        except Exception as failure:  # noqa: BLE001 - other workers will find out by themselves
            log.warning("pause_not_recorded", error=str(failure) or type(failure).__name__)


def _implies(minute: Limit, short: Limit) -> bool:
    """No short period holds more than its limit where no minute does."""
    return minute.requests is not None and short.requests is not None and minute.requests <= short.requests


def put_off(seconds: float) -> PutOff:
    """Later by so many seconds, and a little spread, so that not all come back in the same moment."""
    return PutOff(_later(seconds))


def _later(seconds: float) -> float:
    return max(seconds, 0.1) * random.uniform(1.0, 1.1)  # noqa: S311
