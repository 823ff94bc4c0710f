"""Queries that a hosted provider embeds: each within the budget that workers share, and recorded for who asked.

A text that was embedded for the user before, as a query or in a document, is not paid for again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog

from upload_pipeline.database import provider_budget
from upload_pipeline.database.embedding_cache import cached_vector, keep_vectors
from upload_pipeline.database.usage import Usage, record_usage
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.openai_embedder import (
    PROVIDER,
    EmbeddingAnswer,
    EmbeddingError,
    OpenAIEmbedder,
    sendable,
)
from upload_pipeline.providers.provider_failures import Remedy
from upload_pipeline.providers.request_packing import bound_tokens
from upload_pipeline.rate_headers import RateLimits, key_id_of, read_rate_limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.database.queue import Executor
    from upload_pipeline.prices import PriceTable
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.providers.embedding import Embedder
    from upload_pipeline.settings import Settings

log = structlog.get_logger(__name__)

PATIENCE = 3.0
"""Seconds that a search waits for the budget."""

TRIES = 3
"""Of a request that failed in a way that may pass."""

_FIRST_DELAY = 0.2  # seconds, doubled each time
_LIFE_SLACK = timedelta(seconds=10)  # between a request's timeout and the end of its reservation
_BOOKS_SECONDS = 5.0  # for writing down what a query used


@dataclass
class BudgetError(PipelineError):
    """The limits leave no room for the request, and nothing was asked.

    Attributes:
        seconds: until there may be.
    """

    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PaidQueries:
    """How queries are embedded by a provider that is paid for it.

    Attributes:
        db: as role `upload_worker`; keeps the budget and the books.
        calls: counts and times the requests.
        timeout: seconds after which the embedder gives a request up.
        request_limit: in a minute, where that is less than the provider allows.
        token_limit: the same for tokens.
        prices: the setting.
    """

    embedder: OpenAIEmbedder
    db: Executor
    calls: ProviderCalls
    timeout: float
    request_limit: int | None
    token_limit: int | None
    prices: PriceTable

    async def embed(self, query: str, *, user_id: UUID) -> NDArray[np.float32]:
        """The vector of a query.

        Raises:
            PipelineError: `EMBED_FAILED` where the limit is reached or no answer comes; `EMBED_QUOTA`, `EMBED_DENIED`,
                `EMBED_REJECTED`, `REQUEST_OVER_BUDGET`.
        """
        known = await self._look_up(query, user_id)
        if known is not None:
            return known
        answer = await self._ask(query, user_id, "search")
        await self._keep(query, user_id, answer)
        vector: NDArray[np.float32] = answer.vectors[0]
        return vector

    async def try_out(self, text: str) -> None:
        """Has a text embedded that is nobody's: it is asked for in any case, and recorded as `trial`.

        Raises:
            PipelineError: as `embed`; `BudgetError` where the limit is reached.
        """
        await self._ask(text, None, "trial")

    async def _ask(self, query: str, user_id: UUID | None, operation: str) -> EmbeddingAnswer:
        for tries in range(1, TRIES + 1):
            try:
                answer = await self._request(query, user_id, operation)
            except EmbeddingError as error:
                if tries == TRIES or error.remedy not in (Remedy.AGAIN, Remedy.WAIT):
                    raise
                if error.remedy is Remedy.AGAIN:
                    await asyncio.sleep(_FIRST_DELAY * 2 ** (tries - 1))
            else:
                if not answer.unusable:
                    return answer
        raise PipelineError(ErrorCode.EMBED_FAILED, "The embedder gives the text a vector that has no direction.")

    async def _look_up(self, query: str, user_id: UUID) -> NDArray[np.float32] | None:
        """The vector that was paid for before; None where there is none, or no telling."""
        try:
            async with asyncio.timeout(_BOOKS_SECONDS):
                known = await cached_vector(self.db, user_id=user_id, model=self.embedder.model, text=sendable(query))
        except Exception as error:  # noqa: BLE001 - it can be paid for
            log.warning("cache_not_read", error=str(error) or type(error).__name__)
            return None
        if known is not None:
            self.calls.spared(PROVIDER, "search", 1)
            await self._record(Usage(uuid4(), PROVIDER, self.embedder.api_model, "search", user_id=user_id, cached=1))
        return known

    async def _keep(self, query: str, user_id: UUID, answer: EmbeddingAnswer) -> None:
        """The vector is there: a search does not fail for the next one's sake."""
        try:
            async with asyncio.timeout(_BOOKS_SECONDS):
                await keep_vectors(
                    self.db, model=self.embedder.model, texts=[(user_id, sendable(query))], vectors=answer.vectors
                )
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("vector_not_kept", error=str(error) or type(error).__name__)

    async def _request(self, query: str, user_id: UUID | None, operation: str) -> EmbeddingAnswer:
        reserved = bound_tokens(query)
        granted = await provider_budget.reserve_in_turn(
            self.db,
            provider=PROVIDER,
            key_id=key_id_of(self.embedder.api_key),
            model=self.embedder.api_model,
            requests=1,
            tokens=reserved,
            longest=PATIENCE,
            request_limit=self.request_limit,
            token_limit=self.token_limit,
            life=timedelta(seconds=self.timeout) + _LIFE_SLACK,
        )
        if isinstance(granted, provider_budget.Wait):
            raise BudgetError(
                ErrorCode.EMBED_FAILED,
                f"The embedder's rate limit is reached: ask again in {granted.seconds:.0f} s, or search by words only "
                "(mode `text`).",
                {"retry_after": round(granted.seconds, 1)},
                seconds=granted.seconds,
            )
        tokens: int | None = None
        limits: RateLimits | None = None
        paid = False
        try:
            with self.calls.measured(PROVIDER, "embed"):
                answer = await self.embedder.request([query])
            tokens, limits, paid = answer.tokens, read_rate_limits(answer.headers), True
        except EmbeddingError as error:
            tokens, limits, paid = error.tokens, error.limits(), error.broken
            raise
        finally:
            await self._write_down(granted.reservation_id, tokens, limits)
            if paid:
                used = reserved if tokens is None else tokens
                await self._record(
                    Usage(
                        uuid4(), PROVIDER, self.embedder.api_model, operation, user_id=user_id, requests=1, tokens=used
                    )
                )
        self.calls.worked(PROVIDER, "embed", "texts", 1)
        return answer

    async def _write_down(self, reservation_id: UUID, tokens: int | None, limits: RateLimits | None) -> None:
        """What was reserved counts until its end where this cannot be written; the answer is worth more."""
        try:
            async with asyncio.timeout(_BOOKS_SECONDS):
                await provider_budget.settle(self.db, reservation_id, tokens=tokens, limits=limits)
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("budget_not_settled", error=str(error) or type(error).__name__)

    async def _record(self, used: Usage) -> None:
        """The vector is there and paid for: a search does not fail for its bill."""
        try:
            async with asyncio.timeout(_BOOKS_SECONDS):
                await record_usage(self.db, [used], self.prices)
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("usage_not_recorded", error=str(error) or type(error).__name__, tokens=used.tokens)


def paid_queries(embedder: Embedder, db: Executor, calls: ProviderCalls, settings: Settings) -> PaidQueries | None:
    """As the settings say; None for an embedder that costs nothing."""
    if not isinstance(embedder, OpenAIEmbedder):
        return None
    return PaidQueries(
        embedder,
        db,
        calls,
        timeout=settings.openai_timeout,
        request_limit=settings.openai_requests_per_minute or None,
        token_limit=settings.openai_tokens_per_minute or None,
        prices=settings.prices,
    )
