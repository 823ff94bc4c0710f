"""Requests that the terminal makes to hosted providers: within the budget that all processes share, and in its books.

The terminal does not wait long for the budget, and never asks a provider that is paused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor
    from upload_pipeline.providers.detection import DetectionRequest
    from upload_pipeline.providers.llamaparse import LlamaParse, Turn
    from upload_pipeline.providers.openai_detector import OpenAIDetector
    from upload_pipeline.providers.openai_embedder import OpenAIEmbedder
    from upload_pipeline.rate_headers import RateLimits
    from upload_pipeline.settings import Settings

PATIENCE = 5.0
"""Seconds that a request waits for the budget."""

_LIFE_SLACK = timedelta(seconds=10)  # between a request's timeout and the end of its reservation


class NoRoomError(Exception):
    """The limits leave no room for a request now, and nothing was asked.

    Attributes:
        seconds: until there may be.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not asked: the budget of requests is used up; there may be room in {seconds:.0f} s")
        self.seconds = seconds


@asynccontextmanager
async def budget_database(settings: Settings) -> AsyncIterator[Executor]:
    """A connection to where the budget and the books are kept.

    Raises:
        PipelineError: as `open_database`.
    """
    import asyncio

    from upload_pipeline.cli.opening import open_database
    from upload_pipeline.database.connection import connect, connection_options

    urls = await asyncio.to_thread(open_database, settings)
    connection = await connect(urls.worker, connection_options(settings, "upload-pipeline cli"))
    try:
        yield connection
    finally:
        await connection.close()


async def try_embedder(embedder: OpenAIEmbedder, text: str, settings: Settings) -> None:
    """Has a text embedded that is nobody's; the usage has it as `trial`, also what brought nothing.

    Raises:
        NoRoomError: nothing was asked.
        PipelineError: as `PaidQueries.embed`; `EMBED_FAILED` where the provider is paused.
    """
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.providers.openai_embedder import PROVIDER
    from upload_pipeline.rate_headers import key_id_of
    from upload_pipeline.search.paid_queries import BudgetError, paid_queries

    async with budget_database(settings) as db:
        paid = paid_queries(embedder, db, ProviderCalls(), settings)
        if paid is None:
            raise RuntimeError("this embedder is not paid")
        try:
            await paid.try_out(text)
        except BudgetError as error:
            key_id = key_id_of(embedder.api_key)
            await _check_pause(db, PROVIDER, key_id, embedder.api_model, ErrorCode.EMBED_FAILED)
            raise NoRoomError(error.seconds) from error


async def try_detector(detector: OpenAIDetector, request: DetectionRequest, settings: Settings) -> None:
    """Has a picture looked at that is nobody's; the usage has it as `trial`, also what brought nothing.

    Raises:
        NoRoomError: nothing was asked.
        PipelineError: as `OpenAIDetector.detect`; `REQUEST_OVER_BUDGET`; `DETECT_UNAVAILABLE` where the provider is
            paused.
    """
    from upload_pipeline.database import provider_budget
    from upload_pipeline.database.usage import Usage, record_usage
    from upload_pipeline.providers.detection import DetectionError
    from upload_pipeline.rate_headers import key_id_of, read_rate_limits

    key_id, model = key_id_of(detector.api_key), detector.api_model
    bound = detector.bound_tokens(request.message.detection_types)
    async with budget_database(settings) as db:
        granted = await provider_budget.reserve_in_turn(
            db,
            provider=detector.name,
            key_id=key_id,
            model=model,
            requests=1,
            tokens=bound,
            longest=PATIENCE,
            request_limit=settings.detection_requests_per_minute or None,
            token_limit=settings.detection_tokens_per_minute or None,
            life=timedelta(seconds=settings.detection_timeout) + _LIFE_SLACK,
        )
        if isinstance(granted, provider_budget.Wait):
            await _check_pause(db, detector.name, key_id, model, ErrorCode.DETECT_UNAVAILABLE)
            raise NoRoomError(granted.seconds)
        tokens: int | None = None
        limits: RateLimits | None = None
        paid = False
        try:
            answer = await detector.detect(request)
            tokens, limits, paid = answer.tokens, read_rate_limits(answer.headers or {}), True
        except DetectionError as error:
            tokens, limits, paid = error.tokens, error.limits(), error.broken or bool(error.tokens)
            raise
        finally:
            await provider_budget.settle(db, granted.reservation_id, tokens=tokens, limits=limits)
            if paid:
                used = bound if tokens is None else tokens
                await record_usage(
                    db, [Usage(uuid4(), detector.name, model, "trial", requests=1, tokens=used)], settings.prices
                )


def parse_turn(client: LlamaParse, db: Executor, settings: Settings) -> Turn:
    """What each request of the client waits for."""
    from upload_pipeline.database import provider_budget
    from upload_pipeline.providers.llamaparse_results import PROVIDER, ParseError
    from upload_pipeline.rate_headers import RateLimits, key_id_of
    from upload_workers.parse_turns import BUDGET

    key_id = key_id_of(client.api_key)

    @asynccontextmanager
    async def turn(operation: str, seconds: float) -> AsyncIterator[None]:
        del operation
        granted = await provider_budget.reserve_in_turn(
            db,
            provider=PROVIDER,
            key_id=key_id,
            model=BUDGET,
            requests=1,
            tokens=0,
            longest=PATIENCE,
            request_limit=settings.llamaparse_requests_per_minute or None,
            life=timedelta(seconds=seconds) + _LIFE_SLACK,
        )
        if isinstance(granted, provider_budget.Wait):
            await _check_pause(db, PROVIDER, key_id, BUDGET, ErrorCode.PARSE_UNAVAILABLE)
            raise NoRoomError(granted.seconds)
        limits: RateLimits | None = None
        try:
            yield
            limits = RateLimits()
        except ParseError as error:
            if error.retry_after is not None:
                limits = RateLimits(retry_after=error.retry_after)
            raise
        finally:
            await provider_budget.settle(db, granted.reservation_id, limits=limits)

    return turn


async def _check_pause(db: Executor, provider: str, key_id: str, model: str, code: ErrorCode) -> None:
    from upload_pipeline.database import provider_budget

    left = await provider_budget.pause_left(db, provider=provider, key_id=key_id, model=model)
    if left > 0:
        raise PipelineError(
            code,
            f"{provider} is paused for {left:.0f} s more, since its account was empty or its key was refused, and was "
            "not asked. The event provider_paused says why.",
            {"retry_after": round(left, 1)},
        )
