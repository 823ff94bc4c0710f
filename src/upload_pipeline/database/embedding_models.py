"""Embedding models as workers and searches use them, and the verbs that fill one.

One function for each SQL function of `sql/schema/05_models.sql`, which tells what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upload_pipeline.database.queue import Transition

if TYPE_CHECKING:
    from datetime import timedelta
    from uuid import UUID

    from upload_pipeline.database.queue import Executor, Lease

MODEL_CHANGED = "UP007"
"""SQLSTATE: vectors of the model in use are lacking, or it is another one by now."""


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """A row of `embedding_models`: the facts that an embedder is opened by."""

    model: str
    provider: str
    dimensions: int


@dataclass(frozen=True, slots=True)
class ModelRegistry:
    """Which models are in use at a moment.

    Attributes:
        active: the one that searches use; None while none was ever named.
        building: the one that is being filled; None where there is none.
        paused: whether its filling is stopped.
    """

    active: RegisteredModel | None
    building: RegisteredModel | None
    paused: bool


async def read_registry(db: Executor) -> ModelRegistry:
    """The models in use."""
    rows = await db.fetch(
        """
        select model, provider, dimensions, status::text as status, paused from upload_pipeline.embedding_models
         where status in ('active', 'building')
        """
    )
    found = {row["status"]: RegisteredModel(row["model"], row["provider"], row["dimensions"]) for row in rows}
    return ModelRegistry(found.get("active"), found.get("building"), any(row["paused"] for row in rows))


async def active_model(db: Executor) -> RegisteredModel | None:
    """The model that searches use; None while none was ever named."""
    row = await db.fetchrow(
        "select model, provider, dimensions from upload_pipeline.embedding_models where status = 'active'"
    )
    return RegisteredModel(**row) if row else None


async def register_model(db: Executor, *, model: str, provider: str, dimensions: int) -> RegisteredModel:
    """The active model; where none was ever named, this one from now on.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP005 where this one is registered with other dimensions.
    """
    row = await db.fetchrow(
        "select model, provider, dimensions from upload_pipeline.register_model($1, $2, $3)",
        model,
        provider,
        dimensions,
    )
    return RegisteredModel(**row)


async def pending_refill(db: Executor, *, document_id: UUID, model: str, limit: int) -> list[tuple[UUID, str]]:
    """(chunk id, text) of live chunks that have no vector of the model, in document order."""
    rows = await db.fetch(
        "select chunk_id, text from upload_pipeline.pending_refill($1, $2, $3)", document_id, model, limit
    )
    return [(row["chunk_id"], row["text"]) for row in rows]


async def commit_refill(db: Executor, lease: Lease, *, ttl: timedelta) -> Transition:
    """`queued` -> `filled`: the document has every vector of the model that is being filled.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP007 where it has not.
    """
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_refill($1, $2, $3)", lease.job_id, lease.token, ttl
    )
    return Transition(**row)


async def note_model_failure(db: Executor, *, model: str, failure: str) -> None:
    """Keeps for operators why a model is filled no further; of one that is not being filled nothing."""
    await db.fetchval("select upload_pipeline.note_model_failure($1, $2)", model, failure)


async def enqueue_refills(db: Executor) -> tuple[int, bool]:
    """Makes jobs for a page of documents; how many, and whether there may be more to do at once."""
    row: Any = await db.fetchrow("select jobs, more from upload_pipeline.enqueue_refills()")
    return row["jobs"], row["more"]


async def settle_models(db: Executor) -> int:
    """Moves or removes a bounded number of vectors after a change of models; how many."""
    row: Any = await db.fetchrow("select moved, removed from upload_pipeline.settle_models()")
    return int(row["moved"] + row["removed"])
