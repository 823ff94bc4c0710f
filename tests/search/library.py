"""Documents as the pipeline would leave them, put into the database without its queue: that has tests of its own."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np

from upload_pipeline import ids
from upload_pipeline.providers.embedding import Embedder
from upload_pipeline.text.chunker import CHUNKER, Chunk, ChunkOptions, chunk_markdown

_INSERT_DOCUMENT = """
insert into upload_pipeline.documents
  (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata)
values ($1, $2, $3, 'text/markdown', $4, $5, $6, $7)
"""

_INSERT_CHUNKS = """
insert into upload_pipeline.document_chunks
  (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, page_from, page_to,
   heading_path, section_ids, embed_model, embedding, live)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
"""


class Library:
    """Puts documents into a database, as its owner."""

    def __init__(self, admin: asyncpg.Connection, embedder: Embedder) -> None:
        self.admin = admin
        self.embedder = embedder

    async def add(
        self,
        user_id: UUID,
        filename: str,
        markdown: str,
        *,
        page_starts: Sequence[int] = (),
        metadata: str = "{}",
        live: bool = True,
        options: ChunkOptions | None = None,
    ) -> UUID:
        """Chunks, embeds and stores a document's Markdown; returns its id."""
        await self.register(self.embedder.model, self.embedder.dimensions)
        data = markdown.encode()
        digest = sha256(data).hexdigest()
        document = ids.document_id(user_id, digest)
        await self.admin.execute(
            _INSERT_DOCUMENT, document, user_id, filename, len(data), digest, f"raw/{user_id}/{document}", metadata
        )
        chunks = chunk_markdown(markdown, page_starts=page_starts, options=options or ChunkOptions())
        vectors = await self.embedder.embed([chunk.text for chunk in chunks])
        await self.admin.executemany(
            _INSERT_CHUNKS,
            [self._row(document, user_id, chunk, vector, live) for chunk, vector in zip(chunks, vectors, strict=True)],
        )
        return document

    async def register(self, model: str, dimensions: int) -> None:
        await self.admin.execute("select upload_pipeline.register_model($1, 'local', $2)", model, dimensions)

    def _row(self, document: UUID, user_id: UUID, chunk: Chunk, vector: np.ndarray, live: bool) -> tuple[Any, ...]:
        digest = sha256(chunk.text.encode()).hexdigest()
        sections = [
            ids.section_id(document, CHUNKER, ordinal, title)
            for ordinal, title in zip(chunk.section_ordinals, chunk.heading_path, strict=True)
        ]
        return (
            ids.chunk_id(document, CHUNKER, chunk.ordinal, digest),
            document,
            user_id,
            chunk.ordinal,
            chunk.text,
            digest,
            CHUNKER,
            chunk.start,
            chunk.end,
            chunk.page_from,
            chunk.page_to,
            list(chunk.heading_path),
            sections,
            self.embedder.model,
            vector,
            live,
        )
