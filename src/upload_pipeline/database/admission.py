"""Bytes that requests are sending, counted in Postgres for all processes of the HTTP service."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class AdmissionAnswer:
    """Whether a request was admitted, and the bytes in use then, its own among them where it was."""

    admitted: bool
    bytes_in_use: int


async def admit_bytes(
    db: Executor, *, admission_id: UUID, size: int, limit: int, ttl: timedelta, correlation_id: str
) -> AdmissionAnswer:
    """Admits a request of `size` bytes for `ttl`, or does not; exact over all callers."""
    row = await db.fetchrow(
        "select admitted, bytes_in_use from upload_pipeline.admit_bytes($1, $2, $3, $4, $5)",
        admission_id,
        size,
        limit,
        ttl,
        correlation_id,
    )
    return AdmissionAnswer(row["admitted"], row["bytes_in_use"])


async def renew_admissions(db: Executor, held: Mapping[UUID, int], *, ttl: timedelta) -> None:
    """Keeps admissions, given with their bytes, for another `ttl`; one statement for all."""
    await db.fetchval("select upload_pipeline.renew_admissions($1, $2, $3)", list(held), list(held.values()), ttl)


async def release_admission(db: Executor, admission_id: UUID) -> None:
    """Ends an admission; safe to repeat."""
    await db.fetchval("select upload_pipeline.release_admission($1)", admission_id)
