"""What a request brought is written before anybody is told of it: it is paid for.

One transaction puts the vectors into the cache and notes which of the chunks that wait have theirs there. Whoever comes
later, after a crash or for another document of the same user, finds them in the cache. What it cost is written behind
it. Both are tried again while the database is away for a moment; both count once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from upload_pipeline.database.embedding_cache import WaitingChunk, keep_vectors
from upload_pipeline.database.usage import record_usage
from upload_pipeline.providers.openai_embedder import sendable
from upload_workers.passing import is_passing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.database.queue import Executor
    from upload_pipeline.database.usage import Usage
    from upload_pipeline.prices import PriceTable
    from upload_workers.embedding_line import Item

log = structlog.get_logger(__name__)

TRIES = 5
"""How often a write is tried while the database is away."""

_DELAY = 0.5  # seconds between them


async def keep_paid(db: Executor, model: str, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
    """Writes the vectors of texts, row by row, for all who wait for them now.

    Raises:
        asyncpg.PostgresError, asyncpg.InterfaceError, OSError: the database refuses, or is away for longer.
    """
    waiting = [
        WaitingChunk(ticket.job.lease, ticket.chunk_ids[position], place)
        for place, item in enumerate(items)
        for ticket, position in item.waiting
        if ticket.chunk_ids is not None
    ]
    texts = [(item.user_id, sendable(item.text)) for item in items]
    await _insist(lambda: keep_vectors(db, model=model, texts=texts, vectors=vectors, waiting=waiting))


async def keep_books(db: Executor, used: Sequence[Usage], prices: PriceTable) -> None:
    """Records what was used; without it the books lack what was paid, and nothing else is wrong."""
    try:
        await _insist(lambda: record_usage(db, used, prices))
    except Exception as error:  # noqa: BLE001 - see above
        log.warning("usage_not_recorded", error=str(error) or type(error).__name__)


async def _insist(write: Callable[[], Awaitable[object]]) -> None:
    for tries_left in reversed(range(TRIES)):
        try:
            await write()
        except Exception as error:
            if not tries_left or not is_passing(error):
                raise
            log.warning("write_retried", error=str(error) or type(error).__name__)
            await asyncio.sleep(_DELAY)
        else:
            return
