"""What the steps find out about a photo's bytes: the verbs that write it and move its job on.

One function for each SQL function of `sql/schema/05_photo_facts.sql`, which tells what they do. They raise
`asyncpg.PostgresError` with SQLSTATE UP001 where the lease is lost, and then nothing was written.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from upload_pipeline.database.queue import Transition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    from upload_pipeline.database.queue import Executor, Lease


async def commit_photo_copy(db: Executor, lease: Lease, *, shared_key: str, keep: bool, ttl: timedelta) -> Transition:
    """`uploaded` -> `extracting`: the copy that tells no place is in the store, and is the photo from now on."""
    row = await db.fetchrow(
        "select job_id, stage, state from upload_pipeline.commit_photo_copy($1, $2, $3, $4, $5)",
        lease.job_id,
        lease.token,
        shared_key,
        keep,
        ttl,
    )
    return Transition(**row)


async def commit_photo_facts(
    db: Executor,
    lease: Lease,
    *,
    width: int,
    height: int,
    exif: Mapping[str, Any],
    warnings: Sequence[str],
    thumbnail_key: str,
    file_bytes: int,
    file_sha256: str,
    keep: bool,
    ttl: timedelta,
) -> Transition:
    """`extracting` -> `extracted`: the photo was read, and its thumbnail is in the store."""
    row = await db.fetchrow(
        """
        select job_id, stage, state
          from upload_pipeline.commit_photo_facts($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
        """,
        lease.job_id,
        lease.token,
        width,
        height,
        json.dumps(exif, allow_nan=False),
        list(warnings),
        thumbnail_key,
        file_bytes,
        file_sha256,
        keep,
        ttl,
    )
    return Transition(**row)
