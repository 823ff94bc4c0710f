"""Vectors that a provider was paid for: one function for each verb of `sql/schema/05_embedding_cache.sql`.

A text is known by its SHA-256; give it exactly as it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from upload_pipeline.database.vector_wire import vector_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from uuid import UUID

    import numpy as np
    import numpy.typing as npt
    from pgvector import Vector

    from upload_pipeline.database.queue import Executor, Lease


@dataclass(frozen=True, slots=True)
class Filled:
    """What the cache had for some chunks of a document.

    Attributes:
        found: chunks that have their vector now.
        pending: (chunk id, text) of the others, in document order.
    """

    found: int
    pending: list[tuple[UUID, str]]


@dataclass(frozen=True, slots=True)
class WaitingChunk:
    """A chunk that a vector is for.

    Attributes:
        lease: of its job.
        place: of its text among those that `keep_vectors` is given.
    """

    lease: Lease
    chunk_id: UUID
    place: int


async def fill_vectors(db: Executor, lease: Lease, *, model: str, billed_as: str, limit: int) -> Filled:
    """Buffers what the cache has for the first pending chunks of a job's document, and says which it lacks.

    Args:
        db: as role `upload_worker`.
        lease: of the job.
        model: as it is registered.
        billed_as: the model as prices name it, for the books.
        limit: chunks to look at; of an empty answer none is pending.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP001 where the lease is lost.
    """
    rows = await db.fetch(
        "select chunk_id, text from upload_pipeline.fill_vectors($1, $2, $3, $4, $5)",
        lease.job_id,
        lease.token,
        model,
        billed_as,
        limit,
    )
    pending = [(row["chunk_id"], row["text"]) for row in rows if row["text"] is not None]
    return Filled(len(rows) - len(pending), pending)


async def keep_vectors(
    db: Executor,
    *,
    model: str,
    texts: Sequence[tuple[UUID, str]],
    vectors: npt.NDArray[np.float32],
    waiting: Sequence[WaitingChunk] = (),
) -> int:
    """Puts vectors into the cache, and into the buffers of the chunks that wait for them; one transaction.

    A chunk whose job's lease is lost gets none, which is no error: the cache has it for whoever leads the job now.

    Args:
        db: as role `upload_worker`.
        model: as it is registered.
        texts: (user, text), for each row of `vectors`.
        vectors: (n, dimensions).
        waiting: any number for each text.

    Returns:
        How many chunks got a vector.
    """
    stored: int = await db.fetchval(
        "select upload_pipeline.keep_vectors($1, $2, $3, $4, $5, $6, $7, $8)",
        model,
        [user_id for user_id, _ in texts],
        [_key(text) for _, text in texts],
        vector_rows(vectors),
        [chunk.lease.job_id for chunk in waiting],
        [chunk.lease.token for chunk in waiting],
        [chunk.chunk_id for chunk in waiting],
        [chunk.place + 1 for chunk in waiting],
    )
    return stored


async def cached_vector(db: Executor, *, user_id: UUID, model: str, text: str) -> npt.NDArray[np.float32] | None:
    """The vector that a user's text has in the cache, or None."""
    found: Vector | None = await db.fetchval(
        "select upload_pipeline.cached_vector($1, $2, $3)", user_id, model, _key(text)
    )
    return None if found is None else found.to_numpy()


async def forget_unused_vectors(db: Executor, unused: timedelta, *, limit: int) -> int:
    """Removes at most `limit` vectors that were not used for so long; returns how many."""
    return int(await db.fetchval("select upload_pipeline.forget_unused_vectors($1, $2)", unused, limit))


def _key(text: str) -> bytes:
    return sha256(text.encode()).digest()
