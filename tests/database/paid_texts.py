"""Texts that were paid for, as the tests of the cache make and ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

from sessions import Connection
from verbs import add_document, claim, enqueue, value

MODEL = "m3"


def add_chunks(admin: Connection, document: UUID, user: UUID, texts: Sequence[str]) -> list[UUID]:
    """Buffered chunks of a document; their ids in order."""
    chunks = [uuid4() for _ in texts]
    admin.cursor().executemany(
        """
        insert into upload_pipeline.document_chunk_buffer
          (document_id, ordinal, chunk_id, user_id, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
           section_ids)
        values (%s, %s, %s, %s, %s, %s, 'c', 0, 4, '{}', '{}')
        """,
        [
            (document, ordinal, chunks[ordinal], user, text, sha256(text.encode()).hexdigest())
            for ordinal, text in enumerate(texts)
        ],
    )
    return chunks


def start_job(admin: Connection, worker: Connection, user: UUID, texts: Sequence[str]) -> tuple[Any, list[UUID]]:
    """The lease of a new document's job, and the ids of its buffered chunks."""
    document = add_document(admin, user)
    job = enqueue(worker, document, user)
    chunks = add_chunks(admin, document, user, texts)
    (lease,) = [lease for lease in claim(worker, limit=100) if lease.job_id == job]
    return lease, chunks


def fill(db: Connection, lease: Any, limit: int = 100, model: str = MODEL) -> list[tuple[UUID, str | None]]:
    """(chunk, text that is still to be embedded), as `fill_vectors` answers."""
    rows = db.execute(
        "select * from upload_pipeline.fill_vectors(%s, %s, %s, 'billed', %s)",
        [lease.job_id, lease.lease_token, model, limit],
    ).fetchall()
    return [(row.chunk_id, row.text) for row in rows]


def keep(
    db: Connection,
    user: UUID,
    texts: Sequence[str],
    vectors: Sequence[str],
    waiting: Sequence[tuple[Any, UUID, int]] = (),
    model: str = MODEL,
) -> int:
    """Keeps a user's texts for (lease, chunk, place from 1); how many chunks got their vector."""
    return int(
        value(
            db,
            """
            select upload_pipeline.keep_vectors(
              %s, %s::uuid[], %s::bytea[], %s, %s::uuid[], %s::bigint[], %s::uuid[], %s::integer[])
            """,
            model,
            [user] * len(texts),
            [sha256(text.encode()).digest() for text in texts],
            list(vectors),
            [lease.job_id for lease, _, _ in waiting],
            [lease.lease_token for lease, _, _ in waiting],
            [chunk for _, chunk, _ in waiting],
            [place for _, _, place in waiting],
        )
    )


def cached(admin: Connection) -> dict[tuple[UUID, bytes], str]:
    """The whole cache: the vector of (user, digest of the text)."""
    rows = admin.execute("select user_id, text_sha256, embedding::text from upload_pipeline.embedding_cache").fetchall()
    return {(row.user_id, bytes(row.text_sha256)): row.embedding for row in rows}


def key(user: UUID, text: str) -> tuple[UUID, bytes]:
    """As `cached` names a text of a user."""
    return user, sha256(text.encode()).digest()
