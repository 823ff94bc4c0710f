"""Searching as a user: the query becomes a vector, and `upload_pipeline.search_chunks` ranks the user's own chunks.

The call runs as the role `authenticated` with the user's claims, for one transaction, so that the database decides
what is whose; nothing here filters by user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from upload_pipeline.database.as_user import Pool, become_user
from upload_pipeline.database.embedding_models import active_model
from upload_pipeline.database.failures import DATABASE_FAILURES, translate
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.search.query_models import QueryModels

MAX_LIMIT = 1000
"""Most hits of one search, as `search_chunks` has it."""

MODEL_TRIES = 3
"""How often a search begins; each finds another active model than the one before."""

MAX_QUERY_CHARS = 8000
"""Longest query: as much as a chunk may hold (8,000 bytes), since more has no meaning of its own."""


class SearchMode(StrEnum):
    """How hits are found."""

    HYBRID = "hybrid"
    VECTOR = "vector"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that answers a query.

    Attributes:
        text: as it was embedded, so with what it repeats of the chunk before.
        score: the higher the better; only scores of one search compare. `hybrid`: sum of reciprocal ranks; `vector`:
            cosine similarity; `text`: weighted words.
        heading_path: titles of the sections around it, outermost first.
        page: where it begins, from 1; None where the format has no pages.
        page_to: where it ends.
        start: first character in the document's Markdown, from 0.
        end: one past the last.
        metadata: the document's.
    """

    chunk_id: UUID
    document_id: UUID
    filename: str
    text: str
    score: float
    heading_path: tuple[str, ...]
    page: int | None
    page_to: int | None
    start: int
    end: int
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The hits, best first, and the milliseconds from question to answer, embedding included."""

    hits: tuple[Hit, ...]
    took_ms: float


# The vector goes as text: this needs no codec, and nine digits give back each 32-bit float.
_SEARCH = "select * from upload_pipeline.search_chunks($1, $2::text::extensions.vector, $3, $4, $5, $6, $7)"


async def search(
    db: Pool,
    models: QueryModels,
    *,
    user_id: UUID,
    query: str,
    limit: int = 10,
    mode: str = SearchMode.HYBRID,
    document_ids: Sequence[UUID] | None = None,
    metadata_filter: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Searches the chunks of one user.

    Args:
        db: connections of role `upload_worker`, which may become `authenticated`.
        models: who embeds the query; not used by mode `text`.
        user_id: whose chunks.
        query: 1 to `MAX_QUERY_CHARS` characters, not only white space.
        limit: most hits, 1 to `MAX_LIMIT`.
        mode: one of `SearchMode`.
        document_ids: only chunks of these documents; an empty list finds nothing.
        metadata_filter: only documents whose metadata contain this object (Postgres's `@>`).

    Raises:
        PipelineError: `INVALID_ARGUMENT` naming the argument and what is allowed; `SETTING_INVALID` where the active
            model cannot be opened; `EMBED_FAILED`, `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    started = time.perf_counter()
    chosen = _check(query, limit, mode)
    filter_json = _check_filter(metadata_filter)
    for _ in range(MODEL_TRIES):
        name, vector = "", None
        if chosen is not SearchMode.TEXT:
            model = await models.current()
            name, vector = model.name, await model.embed(query, user_id=user_id)
        try:
            # One snapshot for both: the model that is active then is the one whose vectors are searched.
            async with db.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
                active = await active_model(connection) if vector is not None else None
                if active is None or active.model == name:
                    await become_user(connection, user_id)
                    rows = await connection.fetch(
                        _SEARCH,
                        query,
                        None if vector is None else _literal(vector),
                        name,
                        limit,
                        chosen.value,
                        None if document_ids is None else list(document_ids),
                        filter_json,
                    )
                    return SearchResult(tuple(_hit(row) for row in rows), (time.perf_counter() - started) * 1000)
        except DATABASE_FAILURES as error:
            raise translate(error, "search") from error
        models.note_active(active)
    raise PipelineError(
        ErrorCode.EMBED_FAILED, f"The active embedding model has changed {MODEL_TRIES} times. Search again in a moment."
    )


def _check(query: str, limit: int, mode: str) -> SearchMode:
    if not query.strip():
        raise _invalid("query", query, "a text that is not empty")
    if len(query) > MAX_QUERY_CHARS:
        raise _invalid("query", f"{query[:50]}… ({len(query)} characters)", f"at most {MAX_QUERY_CHARS} characters")
    if "\0" in query or any("\ud800" <= character <= "\udfff" for character in query):
        raise _invalid("query", query[:50], "a text without NUL characters and lone surrogates")
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT:
        raise _invalid("limit", limit, f"a number from 1 to {MAX_LIMIT}")
    try:
        return SearchMode(mode)
    except ValueError:
        raise _invalid("mode", mode, "one of " + ", ".join(SearchMode)) from None


def _check_filter(metadata_filter: Mapping[str, Any] | None) -> str | None:
    if metadata_filter is None:
        return None
    if not isinstance(metadata_filter, Mapping):
        raise _invalid("metadata_filter", metadata_filter, "an object of names and values")
    try:
        encoded = json.dumps(dict(metadata_filter), allow_nan=False, ensure_ascii=False)
        encoded.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid("metadata_filter", str(metadata_filter)[:100], f"plain JSON ({error})") from error
    if "\\u0000" in encoded:
        raise _invalid("metadata_filter", str(metadata_filter)[:100], "an object without NUL characters")
    return encoded


def _invalid(name: str, value: object, allowed: str) -> PipelineError:
    return PipelineError(
        ErrorCode.INVALID_ARGUMENT,
        f"{name} is {value!r}, it must be {allowed}.",
        {"argument": name, "value": value if isinstance(value, int | str) else repr(value)},
    )


def _literal(vector: NDArray[np.float32]) -> str:
    return "[" + ",".join(format(float(component), ".9g") for component in vector) + "]"


def _hit(row: Any) -> Hit:
    return Hit(
        chunk_id=row["chunk_id"],
        document_id=row["document_id"],
        filename=row["filename"],
        text=row["text"],
        score=row["score"],
        heading_path=tuple(row["heading_path"]),
        page=row["page_from"],
        page_to=row["page_to"],
        start=row["start_offset"],
        end=row["end_offset"],
        metadata=json.loads(row["metadata"]),
    )
