"""Uploads whose bytes come after their announcement.

One function for each SQL function of `sql/schema/05_uploads.sql`, which tells what they do, and the reads beside them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upload_pipeline.database.queue import Transition

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta
    from uuid import UUID

    from upload_pipeline.database.queue import Executor, Lease


@dataclass(frozen=True, slots=True)
class Reservation:
    """A document that bytes are announced for.

    Attributes:
        job_id: its job; None where `duplicate` and its jobs have been removed.
        duplicate: whether the bytes are known already; then none are awaited.
        raw_key: where they lie, or are to lie.
        deadline: until when they may come; None where `duplicate`.
    """

    document_id: UUID
    job_id: UUID | None
    duplicate: bool
    raw_key: str
    deadline: datetime | None


@dataclass(frozen=True, slots=True)
class Upload:
    """A document as whoever brings its bytes needs to know it.

    Attributes:
        created_at: tells it from one that is made anew under the same id.
        awaited: whether its bytes are still to come.
    """

    document_id: UUID
    filename: str
    raw_key: str
    created_at: datetime
    awaited: bool


async def reserve_document(
    db: Executor,
    *,
    document_id: UUID,
    user_id: UUID,
    filename: str,
    media_type: str,
    file_bytes: int,
    file_sha256: str,
    raw_key: str,
    window: timedelta,
    metadata: Mapping[str, Any],
    priority: int = 0,
    correlation_id: str = "",
) -> Reservation:
    """Makes document and job of bytes that are going to come, or gives back the ones there are.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP003 where a document with the same bytes is being deleted.
    """
    row = await db.fetchrow(
        "select * from upload_pipeline.reserve_document($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        document_id,
        user_id,
        filename,
        media_type,
        file_bytes,
        file_sha256,
        raw_key,
        window,
        json.dumps(metadata),
        priority,
        correlation_id,
    )
    return Reservation(row["document_id"], row["job_id"], row["duplicate"], row["raw_key"], row["upload_deadline"])


async def announce_upload(db: Executor, document_id: UUID) -> bool:
    """Lets the job of an awaited document look for its bytes now; False where there is no such document."""
    return bool(await db.fetchval("select upload_pipeline.announce_upload($1)", document_id))


async def confirm_upload(db: Executor, upload: Upload, *, media_type: str, file_bytes: int) -> bool:
    """Says that the bytes are in place and checked; False where the document is not there any more."""
    return bool(
        await db.fetchval(
            "select upload_pipeline.confirm_upload($1, $2, $3, $4)",
            upload.document_id,
            upload.created_at,
            media_type,
            file_bytes,
        )
    )


async def commit_validation(db: Executor, lease: Lease, *, media_type: str, keep: bool, ttl: timedelta) -> Transition:
    """`queued` -> `job_validated`: the awaited bytes are in the store and are those that were announced."""
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_validation($1, $2, $3, $4, $5)",
        lease.job_id,
        lease.token,
        media_type,
        keep,
        ttl,
    )
    return Transition(**row)


async def load_upload(db: Executor, document_id: UUID) -> Upload | None:
    """A document that is not being deleted, or None."""
    row = await db.fetchrow(
        """
        select document_id, filename, raw_key, created_at, upload_deadline is not null as awaited
          from upload_pipeline.documents where document_id = $1 and deleted_at is null
        """,
        document_id,
    )
    return Upload(**row) if row else None


async def find_upload(db: Executor, *, user_id: UUID, file_sha256: str) -> Upload | None:
    """The user's document that has or awaits these bytes and is not being deleted, or None."""
    row = await db.fetchrow(
        """
        select document_id, filename, raw_key, created_at, upload_deadline is not null as awaited
          from upload_pipeline.documents
         where user_id = $1 and file_sha256 = $2 and deleted_at is null
        """,
        user_id,
        file_sha256,
    )
    return Upload(**row) if row else None


async def has_document(db: Executor, raw_key: str) -> bool:
    """Whether a document that is not being deleted has its bytes under this key, or awaits them there."""
    return bool(
        await db.fetchval(
            "select exists (select from upload_pipeline.documents where raw_key = $1 and deleted_at is null)", raw_key
        )
    )
