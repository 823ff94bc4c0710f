"""Documents put into a database and a store as the pipeline leaves them, without a worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from tests.api.job_rows import add_job
from upload_pipeline.storage.keys import markdown_key, raw_key
from upload_pipeline.storage.store import ObjectStore
from upload_pipeline.storage.store_mark import MARK_KEY

MODEL = "wordllama-256"
"""The service's own embedder's, so that it can search; the vectors are all one."""

DIMENSIONS = 256


@dataclass(frozen=True)
class StoredDocument:
    """A document with its bytes, and its text where it has one."""

    document_id: UUID
    user_id: UUID
    job_id: UUID
    content: bytes
    markdown: str


async def add_document(
    admin: asyncpg.Connection,
    store: ObjectStore,
    user: UUID,
    *,
    filename: str = "paper.txt",
    media_type: str = "text/plain",
    content: bytes = b"bytes of a paper",
    metadata: Mapping[str, Any] | None = None,
    created_at: datetime | None = None,
) -> StoredDocument:
    """A document whose bytes are in the store, with a queued job."""
    job = await add_job(
        admin, user, file_bytes=len(content), metadata=json.dumps(dict(metadata or {})), filename=filename
    )
    document: UUID = await admin.fetchval("select document_id from upload_pipeline.upload_jobs where job_id = $1", job)
    await admin.execute(
        """
        update upload_pipeline.documents
           set media_type = $2, created_at = coalesce($3::timestamptz, created_at) where document_id = $1
        """,
        document,
        media_type,
        created_at,
    )
    await store.put_bytes(raw_key(user, document), content)
    return StoredDocument(document, user, job, content, "")


async def add_text(
    admin: asyncpg.Connection, store: ObjectStore, document: StoredDocument, markdown: str, *, chunks: int = 0
) -> StoredDocument:
    """The same with text in the store, cut into so many live chunks of equal length."""
    digest = sha256(markdown.encode()).hexdigest()
    key = markdown_key(document.user_id, document.document_id, digest)
    await store.put_bytes(key, markdown.encode())
    await admin.execute(
        """
        update upload_pipeline.documents
           set markdown_key = $2, markdown_sha256 = $3, markdown_chars = $4 where document_id = $1
        """,
        document.document_id,
        key,
        digest,
        len(markdown),
    )
    if chunks:
        await admin.execute("select upload_pipeline.register_model($1, 'local', $2)", MODEL, DIMENSIONS)
        length = len(markdown) // chunks
        spans = [(i * length, len(markdown) if i == chunks - 1 else (i + 1) * length) for i in range(chunks)]
        await admin.executemany(
            """
            insert into upload_pipeline.document_chunks
              (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
               page_from, page_to, heading_path, section_ids, embed_model, embedding, live)
            values ($1, $2, $3, $4, $5, repeat('a', 64), 'c', $6, $7, 1, 2, array['One'], array[$8::uuid], $9,
                    array_fill(1, array[256])::extensions.vector, true)
            """,
            [
                (
                    uuid4(),
                    document.document_id,
                    document.user_id,
                    i,
                    markdown[start:end],
                    start,
                    end,
                    uuid4(),
                    MODEL,
                )
                for i, (start, end) in enumerate(spans)
            ],
        )
        await admin.execute(
            """
            update upload_pipeline.documents set chunk_count = $2, embed_model = $3, searchable_at = now()
             where document_id = $1
            """,
            document.document_id,
            chunks,
            MODEL,
        )
    return StoredDocument(document.document_id, document.user_id, document.job_id, document.content, markdown)


async def rows_left(admin: asyncpg.Connection, document: UUID) -> dict[str, int]:
    """How many rows of a document there are, by table; the audit trail is meant to stay."""
    tables = await admin.fetch(
        """
        select distinct table_name from information_schema.columns
         where table_schema = 'upload_pipeline' and column_name = 'document_id'
           and table_name !~ '^events' and table_name <> 'job_overview'
        """
    )
    counted = {}
    for (table,) in tables:
        counted[table] = await admin.fetchval(
            f"select count(*) from upload_pipeline.{table} where document_id = $1", document
        )
    return {table: count for table, count in counted.items() if count}


async def objects_left(store: ObjectStore) -> list[str]:
    """The keys of all objects, but for the mark that maintenance leaves."""
    return sorted([info.key async for info in store.list() if info.key != MARK_KEY])
