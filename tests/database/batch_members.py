"""Batches as the tests of the database make and read them."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4, uuid5

from sessions import Connection


def file_member(user: UUID, ordinal: int, content: bytes, filename: str = "") -> dict[str, Any]:
    """A file whose bytes are in the store; ids follow from user and content."""
    digest = sha256(content).hexdigest()
    document = uuid5(user, digest)
    return {
        "ordinal": ordinal,
        "filename": filename or f"{ordinal}.txt",
        "document_id": str(document),
        "media_type": "text/plain",
        "file_bytes": len(content),
        "file_sha256": digest,
        "raw_key": f"raw/{user}/{document}",
        "metadata": {"department": "claims"},
    }


def refused_member(ordinal: int, code: str = "EMPTY_FILE") -> dict[str, Any]:
    """A file that failed its checks."""
    return {"ordinal": ordinal, "filename": f"{ordinal}.pdf", "error_code": code, "error_message": "It is empty."}


def make_batch(db: Connection, user: UUID, members: list[dict[str, Any]], batch: UUID | None = None) -> list[Any]:
    """The members that `create_batch` answers."""
    return db.execute(
        "select * from upload_pipeline.create_batch(%s, %s, %s, %s, 0::smallint, 'c-1')",
        [batch or uuid4(), user, json.dumps(members), ["a warning"]],
    ).fetchall()


def overview(db: Connection, batch: UUID) -> Any:
    """How far a batch is."""
    return db.execute("select * from upload_pipeline.batch_overview where batch_id = %s", [batch]).fetchone()


def counts(db: Connection, batch: UUID) -> tuple[int, int, int, str]:
    """Processed, failed, open, status."""
    row = overview(db, batch)
    assert row.processed + row.failed + row.open == row.total
    return row.processed, row.failed, row.open, row.status


def failures(db: Connection, batch: UUID) -> dict[int, str]:
    """The codes of failed members."""
    rows = db.execute(
        "select * from upload_pipeline.batch_member_overview where batch_id = %s and outcome = 'failed'", [batch]
    ).fetchall()
    assert all(row.error_message for row in rows)
    return {row.ordinal: row.error_code for row in rows}


def finish_job(admin: Connection, lease: Any) -> None:
    """Ends a claimed job as done, without the work."""
    admin.execute(
        "update upload_pipeline.upload_jobs set stage = 'embeddings_buffered' where job_id = %s", [lease.job_id]
    )
    admin.execute(
        "select * from upload_pipeline.advance_job(%s, %s, 'embeddings_buffered', 'embedded')",
        [lease.job_id, lease.lease_token],
    )


def note(db: Connection, *batches: UUID) -> list[Any]:
    """What a look for completed batches finds; with ids, among these."""
    if batches:
        return db.execute("select * from upload_pipeline.note_batches(%s)", [list(batches)]).fetchall()
    return db.execute("select * from upload_pipeline.note_completed_batches()").fetchall()
