"""Jobs put into a database by the verbs, as a worker would lead them, without a worker."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from upload_pipeline.database import queue
from upload_pipeline.database.queue import Advance, ClaimedJob

TTL = timedelta(minutes=5)
WORKER = uuid4()
STAGES = (
    "queued",
    "job_validated",
    "parsing",
    "parsed",
    "parse_validated",
    "chunking",
    "chunks_buffered",
    "chunked",
    "embedding",
    "embeddings_buffered",
    "embedded",
)


async def add_job(
    admin: asyncpg.Connection, user: UUID, *, file_bytes: int = 1000, metadata: str = "{}", filename: str = "paper.txt"
) -> UUID:
    """A queued job of a new document; its id."""
    document = uuid4()
    await admin.execute(
        """
        insert into upload_pipeline.documents
          (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata)
        values ($1, $2, $3, 'text/plain', $4, $5, $6, $7)
        """,
        document,
        user,
        filename,
        file_bytes,
        sha256(document.bytes).hexdigest(),
        f"raw/{user}/{document}",
        metadata,
    )
    (job,) = await queue.enqueue_jobs(admin, [(document, user)], correlation_id="test")
    return job.job_id


async def claim_all(admin: asyncpg.Connection) -> dict[UUID, ClaimedJob]:
    """Leases all ready jobs, by id."""
    await admin.execute("update upload_pipeline.lanes set max_in_flight = 10000")
    claimed = await queue.claim_jobs(admin, worker_id=WORKER, pool="default", limit=10_000, after_user=None, ttl=TTL)
    return {job.job_id: job for job in claimed}


async def claim(admin: asyncpg.Connection, job: UUID) -> ClaimedJob:
    """Leases a job, and with it all others that are ready."""
    return (await claim_all(admin))[job]


async def advance(admin: asyncpg.Connection, claimed: ClaimedJob, to_stage: str, start: str | None = None) -> None:
    """Leads a claimed job from where it was claimed, or from `start`, to a stage."""
    here = STAGES.index(start or claimed.stage)
    for place in range(here, STAGES.index(to_stage)):
        results = {"chunks": 3} if STAGES[place + 1] == "embedded" else None
        moved = await queue.advance_jobs(
            admin, [Advance(claimed.lease, STAGES[place], STAGES[place + 1], True, results)], ttl=TTL
        )
        assert claimed.job_id in moved


async def event_ids(admin: asyncpg.Connection, job: UUID) -> list[int]:
    """The ids of a job's events, oldest first."""
    rows: list[Any] = await admin.fetch(
        "select event_id from upload_pipeline.events where job_id = $1 order by event_id", job
    )
    return [row["event_id"] for row in rows]
