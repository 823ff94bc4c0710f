"""`chunking` -> `chunks_buffered`: the Markdown is cut, and the whole new set of chunks is buffered."""

from __future__ import annotations

import asyncio
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import UUID

from upload_pipeline import ids
from upload_pipeline.database.documents import Document, buffer_chunks
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.text.chunker import CHUNKER, Chunk, ChunkOptions, chunk_markdown
from upload_workers.stages.source import MARKDOWN_LIMIT, document_of
from upload_workers.steps import Commit, Outcome, StepContext


async def chunk(job: ClaimedJob, context: StepContext) -> Outcome:
    """Cuts the stored Markdown; the same Markdown gives the same rows, ids included."""
    document = await document_of(job, context)
    if document.markdown_key is None:
        message = f"Document {document.document_id} has no Markdown. Retry its job from stage parsed."
        raise PipelineError(ErrorCode.OBJECT_MISSING, message)
    text = await context.store.get_text(document.markdown_key, MARKDOWN_LIMIT)
    settings = context.settings
    options = ChunkOptions(
        target_chars=settings.chunk_target_chars,
        overlap_chars=settings.chunk_overlap_chars,
        max_bytes=settings.chunk_max_bytes,
    )
    return Commit(partial(buffer_chunks, chunks=await asyncio.to_thread(_rows, document, text, options)))


def _rows(document: Document, text: str, options: ChunkOptions) -> list[dict[str, Any]]:
    if sha256(text.encode()).hexdigest() != document.markdown_sha256:
        message = "The stored Markdown is not the one that was checked. Retry the job from stage parsed."
        raise PipelineError(ErrorCode.CHECKSUM_MISMATCH, message, {"key": document.markdown_key})
    chunks = chunk_markdown(text, page_starts=document.page_starts, options=options)
    return [_row(document.document_id, piece) for piece in chunks]


def _row(document_id: UUID, piece: Chunk) -> dict[str, Any]:
    text_sha256 = sha256(piece.text.encode()).hexdigest()
    sections = zip(piece.section_ordinals, piece.heading_path, strict=True)
    return {
        "ordinal": piece.ordinal,
        "chunk_id": str(ids.chunk_id(document_id, CHUNKER, piece.ordinal, text_sha256)),
        "text": piece.text,
        "chunk_sha256": text_sha256,
        "chunker": CHUNKER,
        "start_offset": piece.start,
        "end_offset": piece.end,
        "page_from": piece.page_from,
        "page_to": piece.page_to,
        "heading_path": list(piece.heading_path),
        "section_ids": [str(ids.section_id(document_id, CHUNKER, ordinal, title)) for ordinal, title in sections],
    }
