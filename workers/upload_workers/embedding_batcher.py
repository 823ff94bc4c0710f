"""Embedding by a provider that is paid for each text: the texts of all jobs that a worker leads share its requests.

A text waits in line until a request has room for it; requests go out while fewer than `concurrency` are under way, each
with as many texts as fit, and each job is given its own vectors as they arrive. The same text of the same user is sent
once, however many chunks wait for it. What a request brought is written first (`vector_keeping`): a job that is
cancelled or has lost its lease leaves the line, and what is under way for it is paid for and goes on.

A request waits for the budget that all workers share, but not for long (`embedding_requests`): its jobs are told when
to come back, and their leases are free meanwhile.

    the request                       its texts
    brought vectors                   kept, then told; one without a direction is sent again, then refused
    was refused for content or size   by halves, until the one at fault is alone and fails its own documents
    failed in a way that may pass     sent again a few times, then their jobs fail, to be tried again
    met a limit                       the budget is frozen as the answer said; sent again, or their jobs put off
    met an empty account, a bad key   the provider is paused for all workers; their jobs put off, no retry counted

A job that has failed before shares no request, so that no text brings others down twice.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

import structlog

from upload_pipeline.database.embedding_cache import Filled, fill_vectors
from upload_pipeline.database.usage import Usage
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.openai_embedder import PROVIDER, EmbeddingError, OpenAIEmbedder
from upload_pipeline.providers.provider_failures import Remedy
from upload_workers.embedding_line import Item, Line, PutOff, Ticket
from upload_workers.embedding_requests import EmbeddingRequests
from upload_workers.embedding_usage import usage_of_request
from upload_workers.vector_keeping import keep_books, keep_paid

if TYPE_CHECKING:
    from uuid import UUID

    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.database.queue import ClaimedJob, Executor
    from upload_pipeline.prices import PriceTable
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.providers.embedding import Embedder
    from upload_pipeline.providers.openai_embedder import EmbeddingAnswer
    from upload_pipeline.settings import Settings

log = structlog.get_logger(__name__)

TRIES = 4
"""How often a text is sent before its job fails."""

LINGER = 0.005
"""Seconds that a request which is not full waits for more texts."""

_FIRST_DELAY = 0.25  # seconds before a failed request's texts are sent again; doubled each time
_SAY_GOODBYE = 2.0


class EmbeddingBatcher:
    """One for each worker process and model; used by the tasks of one event loop."""

    def __init__(
        self,
        embedder: OpenAIEmbedder,
        db: Executor,
        calls: ProviderCalls,
        *,
        most: int,
        concurrency: int,
        timeout: float,
        prices: PriceTable,
        request_limit: int | None = None,
        token_limit: int | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            embedder: makes the requests.
            db: keeps the budget.
            calls: counts the requests.
            most: texts in a request.
            concurrency: requests at once.
            timeout: seconds after which the embedder gives a request up.
            prices: what tokens cost.
            request_limit: in a minute, where that is less than the provider allows.
            token_limit: the same for tokens.
        """
        self._embedder = embedder
        self._db = db
        self._calls = calls
        self._most = most
        self._concurrency = concurrency
        self._prices = prices
        self._requests = EmbeddingRequests(
            embedder=embedder,
            db=db,
            calls=calls,
            concurrency=concurrency,
            timeout=timeout,
            request_limit=request_limit,
            token_limit=token_limit,
        )
        self._line = Line()
        self._under_way: set[asyncio.Task[None]] = set()
        self._writing = 0  # of those under way, which have their answer
        self._more = asyncio.Event()
        self._dispatching: asyncio.Task[None] | None = None

    async def embed(
        self,
        job: ClaimedJob,
        texts: Sequence[str],
        *,
        until: float,
        chunk_ids: Sequence[UUID] | None = None,
        looked_at: float | None = None,
    ) -> AsyncGenerator[tuple[list[int], NDArray[np.float32]]]:
        """Gives (positions in `texts`, their vectors) as they arrive, and behind them the failure, if any.

        Args:
            job: whose texts they are.
            texts: of its document.
            until: by the monotonic clock; what is still in line then is put off. What is under way is waited for.
            chunk_ids: one for each text, where these are pending chunks of the job's document: what is given is in
                their buffer then, as long as the job's lease holds, or in the cache.
            looked_at: when `fill` was called that left these, by the monotonic clock; what others brought since is
                not sent and not given, but found by the next call of `fill`.

        Raises:
            PutOff: some texts are to be sent later.
            PipelineError: `EMBED_REJECTED` of a text, `EMBED_FAILED`, `REQUEST_OVER_BUDGET`.
        """
        if self._dispatching is None:
            self._dispatching = asyncio.create_task(self._dispatch(), name="embedding-batcher")
        ticket = self._line.join(job, texts, chunk_ids, looked_at=looked_at)
        self._more.set()
        try:
            while ticket.left or not ticket.arrived.empty():
                try:
                    async with asyncio.timeout_at(_loop_time(until) if until else None):
                        arrived = await ticket.arrived.get()
                except TimeoutError:
                    until = 0.0
                    self._line.put_off(ticket)
                    continue
                if arrived is not None:
                    yield arrived
            if isinstance(ticket.error, PutOff | PipelineError):
                # One request fails many jobs, and each raises its own.
                raise copy.copy(ticket.error)
            if ticket.error is not None:
                raise ticket.error
        finally:
            self._line.withdraw(ticket)

    async def fill(self, job: ClaimedJob, limit: int) -> Filled:
        """Buffers what was paid for before of a job's first `limit` pending chunks, and says which are to be embedded.

        Raises:
            asyncpg.PostgresError: SQLSTATE UP001 where the lease is lost.
        """
        filled = await fill_vectors(
            self._db, job.lease, model=self._embedder.model, billed_as=self._embedder.api_model, limit=limit
        )
        if filled.found:
            self._calls.spared(PROVIDER, "embed", filled.found)
        return filled

    def send_no_more(self) -> None:
        """The worker stops: what is in line, or comes now, is put off; what is under way has its time to come."""
        self._requests.stopping = True
        self._more.set()

    async def close(self) -> None:
        """Gives up what is in line; what is under way, and perhaps paid for, has a moment to come.

        A second call does nothing.
        """
        if self._dispatching is not None:
            self._dispatching.cancel()
            await asyncio.wait([self._dispatching], timeout=_SAY_GOODBYE)
            self._dispatching = None
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=_SAY_GOODBYE)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_SAY_GOODBYE)

    async def _dispatch(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            if len(self._line) < self._most:
                await asyncio.sleep(LINGER)
            if self._requests.stopping or time.monotonic() < self._requests.open_at:
                self._put_off(self._line.take_all())
            # One more than may be sent: it has its budget when a slot is free. What is being written holds no slot, but
            # stops further requests, so that no more answers are held than the database takes.
            while (
                len(self._under_way) - self._writing <= self._concurrency
                and self._writing <= self._concurrency
                and (part := self._line.take(self._most, self._requests.most_tokens))
            ):
                task = asyncio.create_task(self._send(part))
                self._under_way.add(task)
                task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._more.set()

    async def _send(self, part: list[Item], *, more_to_come: bool = False) -> None:
        """Everything about one request; never raises but for cancellation.

        Args:
            part: its texts.
            more_to_come: whether the task makes another request after it, and so keeps its place.
        """
        if len(part) > 1 and sum(item.tokens for item in part) > self._requests.most_tokens:
            # a refusal told of a limit since it was put together
            await self._send_halves(part)
            return
        try:
            paid = await self._requests.send(part)
        except EmbeddingError as error:
            if error.broken:
                await keep_books(self._db, self._used(part, error.tokens), self._prices)
            await self._after_failure(part, error)
        except PutOff:
            self._put_off(part)
        except PipelineError as error:
            if error.code is ErrorCode.REQUEST_OVER_BUDGET and len(part) > 1:
                await self._send_halves(part)
            else:
                self._line.fail(part, error)
        except Exception as error:  # noqa: BLE001 - of the database, or a mistake: the jobs tell
            self._line.fail(part, error)
        else:
            used = self._used(part, paid.answer.tokens)
            self._writing += not more_to_come
            self._more.set()
            try:
                # Not behind the budget: until the vectors are written, a worker that dies loses what they cost.
                await asyncio.gather(self._keep(part, paid.answer, used), self._requests.settle(paid))
            finally:
                self._writing -= not more_to_come

    async def _after_failure(self, part: list[Item], error: EmbeddingError) -> None:
        match error.remedy:
            case Remedy.SPLIT if len(part) > 1:
                await self._send_halves(part)
            case Remedy.SPLIT:
                self._line.fail(part, error)
            case Remedy.PAUSE:
                await self._requests.pause(error)
                self._put_off(part)
            case Remedy.WAIT:
                # The budget is frozen: the next reservation waits, or puts off.
                self._line.put_off_late(part)
                self._send_again(part)
            case Remedy.AGAIN:
                log.warning("embedding_failed", error=error.message, texts=len(part))
                again = self._tried(part, error)
                if again:
                    # In the slot of the request, so that a provider in trouble has fewer of them.
                    await asyncio.sleep(_FIRST_DELAY * 2 ** again[0].tries * random.uniform(0.5, 1.0))  # noqa: S311
                self._send_again(again)

    async def _send_halves(self, part: list[Item]) -> None:
        middle = len(part) // 2
        await self._send(part[:middle], more_to_come=True)
        await self._send(part[middle:], more_to_come=True)

    async def _keep(self, part: list[Item], answer: EmbeddingAnswer, used: list[Usage]) -> None:
        await self._hand_out(part, answer)
        await keep_books(self._db, used, self._prices)

    async def _hand_out(self, part: list[Item], answer: EmbeddingAnswer) -> None:
        """Keeps what came, then tells the jobs; nobody is told of what could not be written."""
        # The next request first, which the slot is free for: it is put together in this thread, as this writing is.
        await asyncio.sleep(LINGER)
        unusable = [part[position] for position in answer.unusable]
        if unusable:
            refused = PipelineError(
                ErrorCode.EMBED_REJECTED, f"The embedder gave a vector without a direction, {TRIES} times."
            )
            self._send_again(self._tried(unusable, refused))
        usable = [row for row in range(len(part)) if row not in answer.unusable]
        if not usable:
            return
        items, vectors = [part[row] for row in usable], answer.vectors[usable]
        try:
            await keep_paid(self._db, self._embedder.model, items, vectors)
        except Exception as error:  # noqa: BLE001 - of the database, or a mistake: the jobs tell
            self._line.fail(items, error)
        else:
            self._deliver(items, vectors)

    def _deliver(self, items: list[Item], vectors: NDArray[np.float32]) -> None:
        mine: dict[Ticket, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for row, item in enumerate(items):
            self._line.forget(item)
            for ticket, position in item.waiting:
                positions, rows = mine[ticket]
                positions.append(position)
                rows.append(row)
        for ticket, (positions, rows) in mine.items():
            ticket.give(positions, vectors[rows])

    def _used(self, part: list[Item], tokens: int | None) -> list[Usage]:
        return usage_of_request(part, provider=PROVIDER, model=self._embedder.api_model, tokens=tokens)

    def _tried(self, part: list[Item], error: Exception) -> list[Item]:
        """Counts a try of each; those that have more, the others fail."""
        for item in part:
            item.tries += 1
        self._line.fail([item for item in part if item.tries >= TRIES], error)
        return [item for item in part if item.tries < TRIES]

    def _send_again(self, part: list[Item]) -> None:
        self._line.put_back(part)
        self._more.set()

    def _put_off(self, part: list[Item]) -> None:
        # Spread a little, so that not all come back in the same moment.
        seconds = max(self._requests.open_at - time.monotonic(), 0.1) * random.uniform(1.0, 1.1)  # noqa: S311
        self._line.fail(part, PutOff(seconds))


def open_batcher(embedder: Embedder, db: Executor, calls: ProviderCalls, settings: Settings) -> EmbeddingBatcher | None:
    """The batcher of a worker, as its settings say; None for an embedder that is not paid."""
    if not isinstance(embedder, OpenAIEmbedder):
        return None
    return EmbeddingBatcher(
        embedder,
        db,
        calls,
        most=settings.embed_batch_size,
        concurrency=settings.openai_concurrency,
        timeout=settings.openai_timeout,
        prices=settings.prices,
        request_limit=settings.openai_requests_per_minute or None,
        token_limit=settings.openai_tokens_per_minute or None,
    )


def _loop_time(monotonic: float) -> float:
    return asyncio.get_running_loop().time() + (monotonic - time.monotonic())
