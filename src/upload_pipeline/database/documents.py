"""The verbs that carry a document's job along: each writes a step's effect and the transition as one transaction.

One function for each SQL function of `sql/schema/05_document*.sql`, which tell what they do. Those that take a
lease raise `asyncpg.PostgresError` with SQLSTATE UP001 where it is lost, and then nothing was written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upload_pipeline.database.queue import Transition
from upload_pipeline.database.vector_wire import vector_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    import numpy as np
    import numpy.typing as npt

    from upload_pipeline.database.queue import Executor, Lease


@dataclass(frozen=True, slots=True)
class AcceptedDocument:
    """A document and its job; `duplicate` where the user had sent the same bytes before.

    Attributes:
        job_id: the latest job of the document; None where its jobs have been removed.
    """

    document_id: UUID
    job_id: UUID | None
    duplicate: bool


@dataclass(frozen=True, slots=True)
class AwaitedBytes:
    """How long a document's bytes have been awaited, by the database's clock.

    Attributes:
        since: when they were announced, last.
        deadline: until when they may come.
        waited: from the one to now.
        left: from now to the other; negative once it is over.
    """

    since: datetime
    deadline: datetime
    waited: timedelta
    left: timedelta


@dataclass(frozen=True, slots=True)
class Document:
    """What the steps read of a document.

    Attributes:
        page_starts: character offset of each page in the normalised markdown; empty where there are no pages.
        awaited: None once its bytes are in the store and were seen to be those that were announced.
        parse_id: a hosted parser's id of its parse; None where it is parsed here.
    """

    document_id: UUID
    user_id: UUID
    filename: str
    media_type: str
    file_bytes: int
    file_sha256: str
    raw_key: str
    page_count: int | None
    markdown_key: str | None
    markdown_sha256: str | None
    page_starts: tuple[int, ...]
    awaited: AwaitedBytes | None = None
    parse_id: str | None = None


@dataclass(frozen=True, slots=True)
class DeletedDocument:
    """A document whose deletion has begun; its objects are still there."""

    document_id: UUID
    user_id: UUID
    raw_key: str


async def accept_document(
    db: Executor,
    *,
    document_id: UUID,
    user_id: UUID,
    filename: str,
    media_type: str,
    file_bytes: int,
    file_sha256: str,
    raw_key: str,
    metadata: Mapping[str, Any],
    priority: int = 0,
    correlation_id: str = "",
) -> AcceptedDocument:
    """Makes document and job of a file whose bytes are in the store, or gives back the ones there are.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP003 where a document with the same bytes is being deleted.
    """
    row = await db.fetchrow(
        "select * from upload_pipeline.accept_document($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        document_id,
        user_id,
        filename,
        media_type,
        file_bytes,
        file_sha256,
        raw_key,
        json.dumps(metadata),
        priority,
        correlation_id,
    )
    return AcceptedDocument(row["document_id"], row["job_id"], row["duplicate"])


async def find_duplicate(db: Executor, *, user_id: UUID, file_sha256: str) -> AcceptedDocument | None:
    """The document that a user's bytes already are, or None.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP003 where it is being deleted.
    """
    row = await db.fetchrow("select * from upload_pipeline.find_duplicate($1, $2)", user_id, file_sha256)
    return AcceptedDocument(row["document_id"], row["job_id"], True) if row else None


async def load_document(db: Executor, document_id: UUID) -> Document | None:
    """A document's row as the steps read it, or None."""
    # While bytes are awaited, only a new announcement of them writes the row, or a session's user who claims it.
    row = await db.fetchrow(
        """
        select document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, page_count, markdown_key,
               markdown_sha256, page_starts, parse_id, updated_at as since, upload_deadline as deadline,
               upload_pipeline.now() - updated_at as waited, upload_deadline - upload_pipeline.now() as left
          from upload_pipeline.documents where document_id = $1
        """,
        document_id,
    )
    if row is None:
        return None
    fields = dict(row)
    wait = AwaitedBytes(**{name: fields.pop(name) for name in ("since", "deadline", "waited", "left")})
    return Document(
        **{**fields, "page_starts": tuple(fields["page_starts"])}, awaited=wait if wait.deadline is not None else None
    )


async def existing_documents(db: Executor, document_ids: Sequence[UUID]) -> set[UUID]:
    """Those of the ids that are documents."""
    rows = await db.fetch(
        "select document_id from upload_pipeline.documents where document_id = any($1)", list(document_ids)
    )
    return {row["document_id"] for row in rows}


async def commit_parse(
    db: Executor,
    lease: Lease,
    *,
    parser: str,
    page_count: int | None,
    warnings: Sequence[str],
    keep: bool,
    ttl: timedelta,
) -> Transition:
    """`parsing` -> `parsed`: the parser's output is in the store."""
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_parse($1, $2, $3, $4, $5, $6, $7)",
        lease.job_id,
        lease.token,
        parser,
        page_count,
        list(warnings),
        keep,
        ttl,
    )
    return Transition(**row)


async def commit_markdown(
    db: Executor,
    lease: Lease,
    *,
    key: str,
    sha256: str,
    chars: int,
    page_starts: Sequence[int],
    keep: bool,
    ttl: timedelta,
) -> Transition:
    """`parsed` -> `parse_validated`: the normalised markdown is in the store."""
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_markdown($1, $2, $3, $4, $5, $6, $7, $8)",
        lease.job_id,
        lease.token,
        key,
        sha256,
        chars,
        list(page_starts),
        keep,
        ttl,
    )
    return Transition(**row)


async def buffer_chunks(
    db: Executor, lease: Lease, *, chunks: Sequence[Mapping[str, Any]], keep: bool, ttl: timedelta
) -> Transition:
    """`chunking` -> `chunks_buffered`: the document's whole new set, as rows of `document_chunk_buffer`."""
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.buffer_chunks($1, $2, $3, $4, $5)",
        lease.job_id,
        lease.token,
        json.dumps(list(chunks)),
        keep,
        ttl,
    )
    return Transition(**row)


async def commit_chunks(db: Executor, lease: Lease, *, keep: bool, ttl: timedelta) -> Transition:
    """`chunks_buffered` -> `chunked`: buffered chunks are stored beside the live ones, not live."""
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_chunks($1, $2, $3, $4)",
        lease.job_id,
        lease.token,
        keep,
        ttl,
    )
    return Transition(**row)


async def pending_vectors(db: Executor, *, document_id: UUID, model: str, limit: int) -> list[tuple[UUID, str]]:
    """(chunk id, text) of buffered chunks that have no vector of the model yet, in document order."""
    rows = await db.fetch(
        "select chunk_id, text from upload_pipeline.pending_vectors($1, $2, $3)", document_id, model, limit
    )
    return [(row["chunk_id"], row["text"]) for row in rows]


async def buffer_vectors(
    db: Executor,
    lease: Lease,
    *,
    model: str,
    chunk_ids: Sequence[UUID],
    embeddings: npt.NDArray[np.float32],
) -> int:
    """Stores vectors, one row of `embeddings` (n, dimensions) for each chunk; returns how many were new."""
    stored: int = await db.fetchval(
        "select upload_pipeline.buffer_vectors($1, $2, $3, $4, $5)",
        lease.job_id,
        lease.token,
        model,
        list(chunk_ids),
        vector_rows(embeddings),
    )
    return stored


async def commit_embeddings(db: Executor, lease: Lease, *, model: str, keep: bool, ttl: timedelta) -> Transition:
    """`embeddings_buffered` -> `embedded`: the new set becomes live; the job ends, so `keep` has no say."""
    del keep
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_embeddings($1, $2, $3, $4)",
        lease.job_id,
        lease.token,
        model,
        ttl,
    )
    return Transition(**row)


async def begin_deletion(db: Executor, document_id: UUID, *, correlation_id: str = "") -> DeletedDocument | None:
    """Hides a document and ends its jobs; None where there is no such document."""
    row = await db.fetchrow("select * from upload_pipeline.begin_deletion($1, $2)", document_id, correlation_id)
    return DeletedDocument(**row) if row else None


async def finish_deletion(db: Executor, document_id: UUID, *, correlation_id: str = "") -> bool:
    """Removes the rows of a document whose deletion has begun; False where there is none."""
    return bool(await db.fetchval("select upload_pipeline.finish_deletion($1, $2)", document_id, correlation_id))


async def unfinished_deletions(db: Executor, *, before: datetime, limit: int = 100) -> list[DeletedDocument]:
    """Deletions begun before a moment and not finished, oldest first."""
    rows = await db.fetch("select * from upload_pipeline.unfinished_deletions($1, $2)", before, limit)
    return [DeletedDocument(**row) for row in rows]
