"""Documents and their chunks as their owner asks for them.

All run on a connection that `as_user` has made the user's, so row-level security decides what there is, and a document
whose deletion has begun is not there; the ones that do not say so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class LatestJob:
    """Where the newest job of a document stands.

    Attributes:
        progress: percent that the stage stands for.
        error: `code`, `message` and `details` of the last failure; None where there was none, or where it is mended.
    """

    job_id: UUID
    pipeline: str
    stage: str
    state: str
    progress: int
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class UserDocument:
    """A document with its newest job.

    Attributes:
        raw_key: where its bytes are kept.
        markdown_key: where its text is kept; None, like `markdown_sha256` and `markdown_chars`, while there is none.
        searchable_at: since when it can be found; None while it cannot.
        upload_deadline: until when its bytes may come; None once they are in the store.
        job: None where its jobs have been removed.
    """

    document_id: UUID
    filename: str
    media_type: str
    file_bytes: int
    file_sha256: str
    metadata: dict[str, Any]
    raw_key: str
    markdown_key: str | None
    markdown_sha256: str | None
    markdown_chars: int | None
    page_count: int | None
    chunk_count: int | None
    warnings: list[str]
    created_at: datetime
    updated_at: datetime
    searchable_at: datetime | None
    upload_deadline: datetime | None
    job: LatestJob | None


@dataclass(frozen=True, slots=True)
class DocumentFilter:
    """Which documents a list shows; None does not restrict.

    Attributes:
        state: of the newest job.
        stage: of the newest job.
        filename: what the name contains, in any case.
        metadata: JSON of an object that the metadata contain.
    """

    state: str | None = None
    stage: str | None = None
    filename: str | None = None
    metadata: str | None = None


@dataclass(frozen=True, slots=True)
class DocumentChunk:
    """A passage of a document as searches find it.

    Attributes:
        start: first character in the document's Markdown, from 0.
        end: one past the last.
        page_from: where it begins, from 1; None where the format has no pages.
    """

    chunk_id: UUID
    ordinal: int
    text: str
    start: int
    end: int
    page_from: int | None
    page_to: int | None
    heading_path: list[str]


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A document's bytes as they were uploaded."""

    raw_key: str
    filename: str
    media_type: str
    file_bytes: int


_DOCUMENTS = """
with page as materialized (
  select d.*, j.job_id, j.pipeline, j.stage, j.state
    from upload_pipeline.documents d
    left join lateral (
      select u.job_id, u.pipeline, u.stage, u.state from upload_pipeline.upload_jobs u
       where u.document_id = d.document_id order by u.seq desc limit 1) j on true
   where {condition})
select p.document_id, p.filename, p.media_type, p.file_bytes, p.file_sha256, p.metadata, p.raw_key, p.markdown_key,
       p.markdown_sha256, p.markdown_chars, p.page_count, p.chunk_count, p.warnings, p.created_at, p.updated_at,
       p.searchable_at, p.upload_deadline, p.job_id, p.pipeline, p.stage, p.state::text as state,
       s.progress::integer as progress, o.error_code, o.error_message, o.error_details
  from page p
  left join upload_pipeline.stages s on s.pipeline = p.pipeline and s.stage = p.stage
  left join upload_pipeline.job_outcomes o on o.job_id = p.job_id
 order by p.created_at desc, p.document_id
"""

_ONE = _DOCUMENTS.format(condition="d.document_id = $1")

# The first bound is always there, so that a plan for any parameters, which Postgres may settle on at the sixth call,
# begins in the index where the page begins. As `case` and not as `coalesce`, which is not taken for leakproof and so
# would be asked only behind row-level security, of each row.
_PAGE = _DOCUMENTS.format(
    condition="""
         d.created_at <= case when $2::timestamptz is null then 'infinity' else $2 end
     and ($2::timestamptz is null or d.created_at < $2 or d.document_id > $3)
     and ($4::text is null or j.state = $4::text::upload_pipeline.job_state)
     and ($5::text is null or j.stage = $5)
     and ($6::text is null or strpos(lower(d.filename), lower($6)) > 0)
     and ($7::jsonb is null or d.metadata @> $7)
   order by d.created_at desc, d.document_id
   limit $1
"""
)

# One row without a chunk where there is the document and no chunk.
_CHUNKS = """
select c.*
  from upload_pipeline.documents d
  left join lateral (
    select k.chunk_id, k.ordinal, k.text, k.start_offset, k.end_offset, k.page_from, k.page_to, k.heading_path
      from upload_pipeline.document_chunks k
     where k.document_id = d.document_id and k.live and k.ordinal > $2
     order by k.ordinal limit $3) c on true
 where d.document_id = $1
 order by c.ordinal
"""


async def find_document(connection: Executor, document_id: UUID) -> UserDocument | None:
    """A document of the user, or None."""
    row = await connection.fetchrow(_ONE, document_id)
    return _document(row) if row else None


async def is_there(connection: Executor, document_id: UUID) -> bool:
    """Whether the user has the document."""
    return bool(
        await connection.fetchval(
            "select exists (select from upload_pipeline.documents d where d.document_id = $1)", document_id
        )
    )


async def is_being_deleted(db: Executor, document_id: UUID, user_id: UUID) -> bool:
    """Whether a deletion of a document of that user has begun and not ended; runs as `upload_worker`."""
    return bool(
        await db.fetchval(
            """
            select exists (select from upload_pipeline.documents d
                            where d.document_id = $1 and d.user_id = $2 and d.deleted_at is not null)
            """,
            document_id,
            user_id,
        )
    )


async def find_file(db: Executor, document_id: UUID, raw_key: str) -> DocumentFile | None:
    """A document's bytes, or None where there are none, or it is gone or being deleted; runs as `upload_worker`.

    For URLs that carry their own permission, so nobody's row-level security says whose the document is.
    """
    row = await db.fetchrow(
        """
        select d.raw_key, d.filename, d.media_type, d.file_bytes from upload_pipeline.documents d
         where d.document_id = $1 and d.raw_key = $2 and d.deleted_at is null and d.upload_deadline is null
        """,
        document_id,
        raw_key,
    )
    return DocumentFile(**row) if row else None


async def list_documents(
    connection: Executor, wanted: DocumentFilter, *, limit: int, before: tuple[datetime, UUID] | None
) -> list[UserDocument]:
    """The user's documents, newest first.

    Args:
        connection: the user's.
        wanted: which ones.
        limit: at most so many.
        before: creation time and id of the last document of the page before.
    """
    rows = await connection.fetch(
        _PAGE, limit, *(before or (None, None)), wanted.state, wanted.stage, wanted.filename, wanted.metadata
    )
    return [_document(row) for row in rows]


async def list_chunks(connection: Executor, document_id: UUID, *, after: int, limit: int) -> list[DocumentChunk] | None:
    """A document's live chunks with an ordinal above `after`, in order; None where the user has no such document."""
    rows = await connection.fetch(_CHUNKS, document_id, after, limit)
    if not rows:
        return None
    return [
        DocumentChunk(
            chunk_id=row["chunk_id"],
            ordinal=row["ordinal"],
            text=row["text"],
            start=row["start_offset"],
            end=row["end_offset"],
            page_from=row["page_from"],
            page_to=row["page_to"],
            heading_path=row["heading_path"],
        )
        for row in rows
        if row["chunk_id"] is not None
    ]


def _document(row: Any) -> UserDocument:
    fields = dict(row)
    job = {name: fields.pop(name) for name in ("job_id", "pipeline", "stage", "state", "progress")}
    code, message, details = (fields.pop(name) for name in ("error_code", "error_message", "error_details"))
    error = None
    if code is not None and job["state"] != "done":
        error = {"code": code, "message": message, "details": json.loads(details) if details else {}}
    fields["metadata"] = json.loads(fields["metadata"])
    return UserDocument(**fields, job=None if job["job_id"] is None else LatestJob(**job, error=error))
