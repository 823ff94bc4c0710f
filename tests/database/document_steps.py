"""The verbs that carry a document as tests call them, and what they leave."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4, uuid5

from sessions import Connection
from verbs import (
    STAGES,
    advance,
    claim_one,
    set_clock,
    value,
)

MODEL = "m3"
SECTION_A, SECTION_B = "A", "B"


def accept(db: Connection, user: UUID, content: bytes = b"bytes") -> Any:
    """The one row that `accept_document` answers; ids follow from user and content."""
    digest = sha256(content).hexdigest()
    document = uuid5(user, digest)
    return db.execute(
        "select * from upload_pipeline.accept_document(%s, %s, 'paper.md', 'text/markdown', %s, %s, %s, '{\"a\": 1}')",
        [document, user, len(content), digest, f"raw/{document}"],
    ).fetchone()


def claim_accepted(db: Connection) -> Any:
    """The job of the one accepted document, claimed at second 0."""
    set_clock(db)
    db.execute("select upload_pipeline.register_model(%s, 'test', 3)", [MODEL])
    accept(db, uuid4())
    return claim_one(db)


def make_chunks(document: UUID, texts: Sequence[str], chunker: str = "test@1") -> list[dict[str, Any]]:
    """Chunks of ten characters each, two to a section: A, A, A > B, A > B, A, A, ..."""
    chunks = []
    for ordinal, text in enumerate(texts):
        path = ["A"] if ordinal % 4 < 2 else ["A", "B"]
        digest = sha256(text.encode()).hexdigest()
        chunks.append(
            {
                "ordinal": ordinal,
                "chunk_id": str(uuid5(document, f"{chunker}/{ordinal}/{digest}")),
                "text": text,
                "chunk_sha256": digest,
                "chunker": chunker,
                "start_offset": ordinal * 10,
                "end_offset": ordinal * 10 + 10,
                "page_from": None,
                "page_to": None,
                "heading_path": path,
                "section_ids": [str(uuid5(document, "/".join(path[: i + 1]))) for i in range(len(path))],
            }
        )
    return chunks


def buffer_chunks(db: Connection, lease: Any, chunks: list[dict[str, Any]], keep: bool = True) -> Any:
    return db.execute(
        "select * from upload_pipeline.buffer_chunks(%s, %s, %s::jsonb, %s)",
        [lease.job_id, lease.lease_token, json.dumps(chunks), keep],
    ).fetchone()


def commit_chunks(db: Connection, lease: Any) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_chunks(%s, %s)", [lease.job_id, lease.lease_token]
    ).fetchone()


def commit_parse(db: Connection, lease: Any, keep: bool = True) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_parse(%s, %s, 'local@1', 3, '{one}', %s)",
        [lease.job_id, lease.lease_token, keep],
    ).fetchone()


def commit_markdown(db: Connection, lease: Any) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_markdown(%s, %s, 'parsed/x.md', repeat('b', 64), 40, '{0,20}')",
        [lease.job_id, lease.lease_token],
    ).fetchone()


def pending(db: Connection, document: UUID, model: str = MODEL) -> list[UUID]:
    rows = db.execute("select chunk_id from upload_pipeline.pending_vectors(%s, %s)", [document, model]).fetchall()
    return [row.chunk_id for row in rows]


def buffer_vectors(
    db: Connection, lease: Any, ids: Sequence[UUID], vectors: Sequence[str] | None = None, model: str = MODEL
) -> int:
    vectors = [f"[{i + 1},1,0]" for i in range(len(ids))] if vectors is None else vectors
    return int(
        value(
            db,
            "select upload_pipeline.buffer_vectors(%s, %s, %s, %s::uuid[], %s)",
            lease.job_id,
            lease.lease_token,
            model,
            list(ids),
            # a literal without a type: the function's own gives it one, and the role need not see the type's schema
            "{" + ",".join(f'"{vector}"' for vector in vectors) + "}",
        )
    )


def commit_embeddings(db: Connection, lease: Any, model: str = MODEL) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_embeddings(%s, %s, %s)", [lease.job_id, lease.lease_token, model]
    ).fetchone()


def lead(db: Connection, lease: Any, texts: Sequence[str], until: str = "embedded", model: str = MODEL) -> None:
    """Leads a claimed job on with the verbs that its steps call, up to a stage."""
    document = lease.document_id
    for here, there in itertools.pairwise(STAGES):
        if STAGES.index(here) < STAGES.index(lease.stage) or here == until:
            if here == until:
                return
            continue
        match here:
            case "parsing":
                commit_parse(db, lease)
            case "parsed":
                commit_markdown(db, lease)
            case "chunking":
                buffer_chunks(db, lease, make_chunks(document, texts))
            case "chunks_buffered":
                commit_chunks(db, lease)
            case "embedding":
                while ids := pending(db, document, model):
                    buffer_vectors(db, lease, ids, model=model)
                advance(db, lease, here, there)
            case "embeddings_buffered":
                commit_embeddings(db, lease, model)
            case _:
                advance(db, lease, here, there)


FOUR = ("one", "two", "three", "four")


def result(db: Connection) -> dict[str, list[Any]]:
    """All that a processed document leaves, times left out."""
    return {
        "chunks": db.execute(
            """
            select chunk_id, ordinal, text, start_offset, end_offset, heading_path, section_ids, embed_model,
                   embedding::text, live from upload_pipeline.document_chunks order by document_id, ordinal, chunk_id
            """
        ).fetchall(),
        "nodes": db.execute("select * from upload_pipeline.document_nodes order by node_id").fetchall(),
        "edges": db.execute(
            "select * from upload_pipeline.document_edges order by source_id, kind, target_id"
        ).fetchall(),
        "documents": db.execute(
            """
            select document_id, parser, page_count, warnings, markdown_key, markdown_sha256, markdown_chars,
                   page_starts, chunker, chunk_count, embed_model, searchable_at
              from upload_pipeline.documents order by 1
            """
        ).fetchall(),
    }


def buffered(db: Connection) -> tuple[int, int]:
    """Rows in the chunk and the vector buffer."""
    return (
        value(db, "select count(*) from upload_pipeline.document_chunk_buffer"),
        value(
            db,
            """
            select (select count(*) from upload_pipeline.document_vector_buffer)
                 + (select coalesce(sum(cardinality(chunk_ids)), 0) from upload_pipeline.document_cached_chunks)
            """,
        ),
    )
