"""Announcing a file whose bytes are to come: checked as far as its description goes, and made a document with a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from upload_pipeline import ids
from upload_pipeline.database import uploads
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.arrival import check_arrival, invalid_argument
from upload_pipeline.intake.local_file import too_large
from upload_pipeline.intake.placing import named
from upload_pipeline.intake.staging import Intake, Terms, require_taken
from upload_pipeline.media_types import declared_media_type
from upload_pipeline.storage.keys import raw_key

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ReservedUpload:
    """A document that awaits its bytes, or, where they are known already, has them.

    Attributes:
        job_id: its job; None where `duplicate` and its jobs have been removed.
        duplicate: whether the bytes are known; then none are awaited.
        raw_key: where they lie, or are to lie.
        media_type: what the file should be by its description; its bytes decide.
        deadline: until when they may come; None where `duplicate`.
    """

    document_id: UUID
    job_id: UUID | None
    duplicate: bool
    raw_key: str
    media_type: str
    deadline: datetime | None


async def reserve_upload(
    intake: Intake,
    *,
    filename: str,
    file_bytes: int,
    media_type: str,
    file_sha256: str,
    user_id: UUID,
    metadata: Mapping[str, Any],
    correlation_id: str,
    priority: int = 0,
    window: timedelta,
    terms: Terms | None = None,
) -> ReservedUpload:
    """Makes document and job of a file whose bytes are to come within the window; the job waits for them.

    Same user and same sha256 again: where the bytes are known, the first document and job, `duplicate` set; where they
    are awaited, the same document and job under the newer description and deadline, started again if the job has ended.

    Args:
        intake: database, limits.
        filename: as the sender names it; shown and stored as `display_name` makes it.
        file_bytes: how many bytes there will be.
        media_type: as in a `Content-Type` header; empty or `application/octet-stream` where the sender does not know.
        file_sha256: of the bytes, 64 hexadecimal digits.
        user_id: the owner.
        metadata: see `check_metadata`.
        correlation_id: stands on every event and log line that follows; at most 200 characters.
        priority: of the job within its user's, -32768 to 32767, highest first.
        window: how long the bytes are awaited.
        terms: what is taken; None: any known type up to `intake.max_bytes`.

    Raises:
        PipelineError: `INVALID_METADATA`, `INVALID_ARGUMENT`, `EMPTY_FILE`, `FILE_TOO_LARGE`, `UNSUPPORTED_TYPE`,
            `TYPE_MISMATCH`; `INVALID_STATE` while a document with the same bytes is being deleted;
            `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    terms = terms or Terms(intake.max_bytes)
    arrival = check_arrival(filename, user_id, metadata, correlation_id, priority)
    digest = file_sha256.lower()
    if _SHA256.fullmatch(digest) is None:
        raise invalid_argument("sha256", file_sha256[:100], "the sha256 of the bytes in 64 hexadecimal digits")
    if file_bytes < 1:
        raise PipelineError(
            ErrorCode.EMPTY_FILE,
            f"{arrival.filename!r} is announced with {file_bytes} bytes. Send a file with content.",
            {"filename": arrival.filename},
        )
    if file_bytes > terms.max_bytes:
        raise too_large(arrival.filename, terms.max_bytes)
    expected_type = declared_media_type(arrival.filename, media_type)
    require_taken(arrival.filename, expected_type, terms)
    document_id = ids.document_id(user_id, digest)
    reserved = await named(
        uploads.reserve_document(
            intake.db,
            document_id=document_id,
            user_id=user_id,
            filename=arrival.filename,
            media_type=expected_type,
            file_bytes=file_bytes,
            file_sha256=digest,
            raw_key=raw_key(user_id, document_id),
            window=window,
            metadata=arrival.metadata,
            priority=arrival.priority,
            correlation_id=arrival.correlation_id,
        ),
        f"reserve {arrival.filename!r}",
    )
    return ReservedUpload(
        reserved.document_id, reserved.job_id, reserved.duplicate, reserved.raw_key, expected_type, reserved.deadline
    )
