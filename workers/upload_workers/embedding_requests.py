"""Requests to an embedder that is paid: each within the budget that all workers share, and none while it is paused.

A request is reserved before it is sent, also while it waits for one of the slots, and settled after it, with what the
answer told of tokens and limits. Where the budget takes longer than `PATIENCE`, nobody waits here: the texts are put
off.

Where a request is refused since it is larger than a whole minute, and the refusal says how much a minute holds, no
larger one is made here for `TOLD_SECONDS`. The budget is not told: it believes headers, which every good answer brings
anew, and a limit that stood in a refusal only would never be taken back by a server that sends none.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline.database import provider_budget
from upload_pipeline.providers.openai_embedder import PROVIDER, EmbeddingError
from upload_pipeline.providers.provider_failures import Remedy
from upload_pipeline.providers.request_packing import MAX_REQUEST_TOKENS
from upload_pipeline.rate_headers import RateLimits, key_id_of, read_rate_limits
from upload_workers.embedding_line import PutOff

if TYPE_CHECKING:
    from collections.abc import Sequence

    from upload_pipeline.database.queue import Executor
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.providers.openai_embedder import EmbeddingAnswer, OpenAIEmbedder
    from upload_workers.embedding_line import Item

log = structlog.get_logger(__name__)

PATIENCE = 5.0
"""Seconds that a job waits for the budget with its lease held; beyond, it is put off."""

PAUSE_SECONDS = 600.0
"""For which nobody calls a provider whose account is empty or whose key is refused."""

TOLD_SECONDS = 600.0
"""For which a limit is believed that stood in a refusal; it may be raised, and nobody tells."""

_LIFE_SLACK = timedelta(seconds=10)  # between a request's timeout and the end of its reservation


@dataclass(frozen=True, slots=True)
class Paid:
    """An answer, and what was reserved for it."""

    answer: EmbeddingAnswer
    reservation_id: UUID


@dataclass(kw_only=True)
class EmbeddingRequests:
    """Those of one worker, by one model.

    Attributes:
        embedder: makes the requests.
        db: keeps the budget.
        calls: counts the requests.
        concurrency: requests at once.
        timeout: seconds after which the embedder gives a request up.
        request_limit: in a minute, where that is less than the provider allows.
        token_limit: the same for tokens.
        open_at: by the monotonic clock; until then everything is put off.
        stopping: nothing is sent any more.
    """

    embedder: OpenAIEmbedder
    db: Executor
    calls: ProviderCalls
    concurrency: int
    timeout: float
    request_limit: int | None = None
    token_limit: int | None = None
    open_at: float = 0.0
    stopping: bool = False
    _told: int = 0  # tokens of a minute, as a refusal said
    _told_until: float = 0.0
    _slots: asyncio.Semaphore = field(init=False)
    _refusals: int = 0  # limits and pauses that were met: what was reserved before one is not sent after it
    _place: UUID | None = None  # in line for the budget

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)
        self._key_id = key_id_of(self.embedder.api_key)
        # A call is made when it has waited for the slot of another.
        self._life = 2 * timedelta(seconds=self.timeout) + _LIFE_SLACK

    @property
    def most_tokens(self) -> int:
        """Most tokens that a request of several texts may hold now."""
        told = self._told if time.monotonic() < self._told_until else MAX_REQUEST_TOKENS
        return min(MAX_REQUEST_TOKENS, self.token_limit or MAX_REQUEST_TOKENS, told)

    async def send(self, part: Sequence[Item]) -> Paid:
        """Reserves and asks. What failed is settled; an answer is to be, beside keeping what it brought.

        Raises:
            EmbeddingError: as the embedder.
            PutOff: the budget takes longer than anybody here waits.
            PipelineError: `REQUEST_OVER_BUDGET`.
        """
        while True:
            refusals = self._refusals
            reservation_id = await self._reserve(part)
            async with self._slots:
                if refusals == self._refusals and not self.stopping:
                    answer = await self._ask(part, reservation_id)
                    break
            await provider_budget.release(self.db, reservation_id)
            if self.stopping:
                raise PutOff(0.0)
            if time.monotonic() < self.open_at:
                raise PutOff(self.open_at - time.monotonic())
        self.calls.worked(PROVIDER, "embed", "texts", len(part))
        return Paid(answer, reservation_id)

    async def settle(self, paid: Paid) -> None:
        """Tells the budget what an answer said of tokens and limits; never raises but for cancellation."""
        await self._settle(paid.reservation_id, paid.answer.tokens, read_rate_limits(paid.answer.headers))

    async def pause(self, error: EmbeddingError) -> None:
        """Stops the provider for all workers, with one alarm."""
        self._close_for(PAUSE_SECONDS)
        log.error("provider_paused", provider=PROVIDER, code=error.code.value, error=error.message)
        try:
            await provider_budget.pause(
                self.db,
                provider=PROVIDER,
                key_id=self._key_id,
                model=self.embedder.api_model,
                seconds=PAUSE_SECONDS,
                code=error.code.value,
                message=error.message,
            )
        except Exception as failure:  # noqa: BLE001 - other workers will find out by themselves
            log.warning("pause_not_recorded", error=str(failure) or type(failure).__name__)

    async def _reserve(self, part: Sequence[Item]) -> UUID:
        # Of the places in line that are kept while jobs are put off, one is enough for a worker.
        place, self._place = self._place, None
        granted = await provider_budget.reserve_in_turn(
            self.db,
            provider=PROVIDER,
            key_id=self._key_id,
            model=self.embedder.api_model,
            requests=1,
            tokens=sum(item.tokens for item in part),
            longest=PATIENCE,
            reservation_id=place,
            keep_place=True,
            request_limit=self.request_limit,
            token_limit=self.token_limit,
            life=self._life,
        )
        if not isinstance(granted, provider_budget.Wait):
            return granted.reservation_id
        if self._place is None:
            self._place = granted.reservation_id
        else:
            await provider_budget.release(self.db, granted.reservation_id)
        self._close_for(granted.seconds)
        raise PutOff(granted.seconds)

    async def _ask(self, part: Sequence[Item], reservation_id: UUID) -> EmbeddingAnswer:
        """Asks. What failed is settled before the slot is free: whoever is next finds the limit that was met."""
        tokens: int | None = None
        limits: RateLimits | None = None
        answer: EmbeddingAnswer | None = None
        try:
            with self.calls.measured(PROVIDER, "embed"):
                answer = await self.embedder.request([item.text for item in part])
        except EmbeddingError as error:
            tokens, limits = error.tokens, error.limits()
            if error.minute is not None:
                self._told, self._told_until = error.minute, time.monotonic() + TOLD_SECONDS
            self._refusals += error.remedy in (Remedy.WAIT, Remedy.PAUSE)
            raise
        finally:
            if answer is None:
                await self._settle(reservation_id, tokens, limits)
        return answer

    async def _settle(self, reservation_id: UUID, tokens: int | None, limits: RateLimits | None) -> None:
        """What was reserved counts until its end where this cannot be written; the vectors are worth more."""
        try:
            async with asyncio.timeout(PATIENCE):
                await provider_budget.settle(self.db, reservation_id, tokens=tokens, limits=limits)
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("budget_not_settled", error=str(error) or type(error).__name__)

    def _close_for(self, seconds: float) -> None:
        self.open_at = max(self.open_at, time.monotonic() + seconds)
