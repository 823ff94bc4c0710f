"""Insurance policies: the verb that makes one together with its document and job, and what their owner reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upload_pipeline.database.documents import AcceptedDocument

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import date
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What its sender says of a policy."""

    insurer: str
    product_name: str
    launch_date: date


async def accept_policy(
    db: Executor,
    facts: PolicyFacts,
    *,
    document_id: UUID,
    user_id: UUID,
    filename: str,
    media_type: str,
    file_bytes: int,
    file_sha256: str,
    raw_key: str,
    metadata: Mapping[str, Any],
    priority: int = 0,
    correlation_id: str = "",
) -> AcceptedDocument:
    """Makes policy, document and job of a file whose bytes are in the store; there is always a job.

    Of bytes that are a document already it makes the policy, or has it say what is said now.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP003 where a document with the same bytes is being deleted.
    """
    row = await db.fetchrow(
        "select * from upload_pipeline.accept_policy($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        document_id,
        user_id,
        filename,
        media_type,
        file_bytes,
        file_sha256,
        raw_key,
        facts.insurer,
        facts.product_name,
        facts.launch_date,
        json.dumps(metadata),
        priority,
        correlation_id,
    )
    return AcceptedDocument(row["document_id"], row["job_id"], row["duplicate"])


async def is_policy(connection: Executor, document_id: UUID) -> bool:
    """Whether a document is a policy of the user whose connection it is (`as_user`)."""
    return bool(
        await connection.fetchval(
            "select exists (select from upload_pipeline.policies p where p.document_id = $1)", document_id
        )
    )
