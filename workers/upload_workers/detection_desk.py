"""Asking a detector for one photo: within the budget, with what it cost recorded, and each failure by its remedy.

    the detector                                     the photo
    has nothing to look for                          done, nobody is asked
    found something, or nothing                      done
    took the message                                 waits for the callback
    gives an answer that cannot be used              fails, to be tried again: it may have been paid for
    cannot be reached, or fails as a whole           put off, ever longer, no retry counted; after `patience` it fails
    met a limit                                      put off as long as it said; of a budget all workers are frozen
    met an empty account, a refused key or URL       put off for 10 minutes with one alarm, no retry counted
    refuses this photo                               fails, for good

So nothing that is wrong with the detector needs a hand on the photos: they go on when it is well again. An answer is
stored in the transaction that ends the job; where the worker dies in between, the photo is asked, and paid, once more.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import structlog

from upload_pipeline.database import provider_budget
from upload_pipeline.database.usage import Usage, record_usage
from upload_pipeline.providers.detection import AnswerLater, Detected, DetectionError, open_detector
from upload_pipeline.providers.openai_detector import OpenAIDetector
from upload_pipeline.providers.provider_failures import Remedy
from upload_pipeline.providers.webhook_detector import WebhookDetector
from upload_pipeline.rate_headers import RateLimits, key_id_of, read_rate_limits

if TYPE_CHECKING:
    from upload_pipeline.database.queue import ClaimedJob, Executor
    from upload_pipeline.prices import PriceTable
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.providers.detection import DetectionRequest, Detector
    from upload_pipeline.settings import Settings

log = structlog.get_logger(__name__)

BUDGET_SECONDS = 5.0
"""That a job waits for its turn with its lease held; beyond, it is put off."""

PAUSE_SECONDS = 600.0
"""For which nobody asks a detector whose account is empty, or that refuses key or messages."""

SHORTEST_DELAY, LONGEST_DELAY = 3.0, 300.0
"""Seconds for which a photo is put off while the detector cannot be reached: half the time that it has waited."""

_LIFE_SLACK = timedelta(seconds=10)  # between a request's timeout and the end of its reservation


@dataclass(frozen=True, slots=True)
class NotNow:
    """Ask again after so many seconds; nothing is wrong with the photo."""

    seconds: float


@dataclass
class DetectionDesk:
    """One for each worker process; used by the tasks of one event loop.

    Attributes:
        detector: is asked.
        db: keeps the budget and the books.
        calls: counts and times the requests.
        concurrency: requests at once.
        timeout: seconds after which the detector gives a request up.
        patience: how long a photo waits for a detector that cannot be reached.
        prices: what tokens cost.
        request_limit: in a minute, where that is less than the provider allows.
        token_limit: the same for tokens.
    """

    detector: Detector
    db: Executor
    calls: ProviderCalls
    concurrency: int
    timeout: float
    patience: timedelta
    prices: PriceTable
    request_limit: int | None = None
    token_limit: int | None = None
    _open_at: float = 0.0  # monotonic: until then everything is put off
    _slots: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)

    @property
    def name(self) -> str:
        """The detector's."""
        return self.detector.name

    @property
    def calls_back(self) -> bool:
        """Whether answers come by a callback."""
        return isinstance(self.detector, WebhookDetector)

    async def ask(
        self, job: ClaimedJob, request: DetectionRequest, *, waited: timedelta
    ) -> Detected | AnswerLater | NotNow:
        """Asks once.

        Args:
            job: whose photo it is, and who pays.
            request: what is asked.
            waited: since the photo came to detection.

        Raises:
            PipelineError: `DETECT_REJECTED`, `DETECT_FAILED`, `DETECT_UNAVAILABLE`, `REQUEST_OVER_BUDGET`, and what
                reading the thumbnail raises.
        """
        if not request.message.detection_types and self.name != "none":
            return Detected(())
        left = self._open_at - time.monotonic()
        if left > 0:
            return _put_off(left)
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                await self._slots.acquire()
        except TimeoutError:
            return _put_off(1.0)
        try:
            if isinstance(self.detector, OpenAIDetector):
                return await self._ask_paid(self.detector, job, request)
            with self.calls.measured(self.name, "detect"):
                return await self._asked(request)
        except DetectionError as error:
            return await self._after_failure(error, waited)
        finally:
            self._slots.release()

    async def close(self) -> None:
        """Closes the connections."""
        await self.detector.close()

    async def _asked(self, request: DetectionRequest) -> Detected | AnswerLater:
        answer = await self.detector.detect(request)
        if not isinstance(answer, Detected) or answer.detections is not None:
            self.calls.worked(self.name, "detect", "photos", 1)
        return answer

    async def _ask_paid(
        self, detector: OpenAIDetector, job: ClaimedJob, request: DetectionRequest
    ) -> Detected | AnswerLater | NotNow:
        """Reserves, asks, settles, records."""
        # Before the grant, which is for as long as the provider may take: a store that stalls would outlive it.
        picture = await request.thumbnail()
        bound = detector.bound_tokens(request.message.detection_types)
        granted = await provider_budget.reserve_in_turn(
            self.db,
            provider=detector.name,
            key_id=key_id_of(detector.api_key),
            model=detector.api_model,
            requests=1,
            tokens=bound,
            longest=BUDGET_SECONDS,
            request_limit=self.request_limit,
            token_limit=self.token_limit,
            life=timedelta(seconds=self.timeout) + _LIFE_SLACK,
        )
        if isinstance(granted, provider_budget.Wait):
            return _put_off(granted.seconds)
        tokens: int | None = None
        limits: RateLimits | None = None
        paid = False
        try:
            with self.calls.measured(detector.name, "detect"):
                answer = await self._asked(replace(request, thumbnail=partial(_once_read, picture)))
            if isinstance(answer, Detected):
                tokens, limits, paid = answer.tokens, read_rate_limits(answer.headers or {}), True
            return answer
        except DetectionError as error:
            tokens, limits, paid = error.tokens, error.limits(), error.broken or bool(error.tokens)
            raise
        finally:
            await self._settle(granted.reservation_id, tokens, limits)
            if paid:
                used = bound if tokens is None else tokens
                await self._record(
                    Usage(uuid4(), detector.name, detector.api_model, "detect", job.job_id, requests=1, tokens=used)
                )

    async def _after_failure(self, error: DetectionError, waited: timedelta) -> NotNow:
        """When to ask again.

        Raises:
            DetectionError: the photo's job fails.
        """
        if error.remedy is Remedy.PAUSE:
            await self._pause(error)
            return _put_off(PAUSE_SECONDS)
        if error.remedy is Remedy.WAIT:
            limits = error.limits()
            return _put_off((limits.retry_after if limits else None) or SHORTEST_DELAY)
        if error.remedy is Remedy.AGAIN and not error.broken and waited < self.patience:
            log.warning("detector_unavailable", detector=self.name, error=error.message)
            return _put_off(min(max(waited.total_seconds() / 2, SHORTEST_DELAY), LONGEST_DELAY))
        raise error

    async def _settle(self, reservation_id: UUID, tokens: int | None, limits: RateLimits | None) -> None:
        """What was reserved counts until its end where this cannot be written; the answer is worth more."""
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                await provider_budget.settle(self.db, reservation_id, tokens=tokens, limits=limits)
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("budget_not_settled", error=str(error) or type(error).__name__)

    async def _record(self, used: Usage) -> None:
        """Before the answer is stored, so that the job's cost has it; a photo does not fail for its bill."""
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                await record_usage(self.db, [used], self.prices)
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("usage_not_recorded", error=str(error) or type(error).__name__, tokens=used.tokens)

    async def _pause(self, error: DetectionError) -> None:
        self._open_at = max(self._open_at, time.monotonic() + PAUSE_SECONDS)
        log.error("provider_paused", provider=self.name, code=error.code.value, error=error.message)
        secret, model = self._account()
        try:
            await provider_budget.pause(
                self.db,
                provider=self.name,
                key_id=key_id_of(secret),
                model=model,
                seconds=PAUSE_SECONDS,
                code=error.code.value,
                message=error.message,
            )
        except Exception as failure:  # noqa: BLE001 - other workers will find out by themselves
            log.warning("pause_not_recorded", error=str(failure) or type(failure).__name__)

    def _account(self) -> tuple[str, str]:
        """By which a pause is known to all workers: a secret, of which only a sum is stored, and a model."""
        if isinstance(self.detector, OpenAIDetector):
            return self.detector.api_key, self.detector.api_model
        if isinstance(self.detector, WebhookDetector):
            return self.detector.secret, urlsplit(self.detector.url).hostname or self.name
        return self.name, self.name


def open_desk(db: Executor, calls: ProviderCalls, settings: Settings) -> DetectionDesk:
    """The desk of a worker, as its settings say.

    Raises:
        PipelineError: `SETTING_INVALID` where a setting or a package that the detector needs is missing.
    """
    return DetectionDesk(
        open_detector(settings),
        db,
        calls,
        concurrency=settings.detection_concurrency,
        timeout=settings.detection_timeout,
        patience=timedelta(seconds=settings.detection_patience),
        prices=settings.prices,
        request_limit=settings.detection_requests_per_minute or None,
        token_limit=settings.detection_tokens_per_minute or None,
    )


async def _once_read(picture: bytes) -> bytes:
    return picture


def _put_off(seconds: float) -> NotNow:
    # Spread a little, so that not all come back in the same moment.
    return NotNow(max(seconds, 0.1) * random.uniform(1.0, 1.1))  # noqa: S311
