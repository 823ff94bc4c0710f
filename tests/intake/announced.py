"""A file that is announced, its bytes sent, its job led by hand, and how it all stands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from hashlib import sha256
from uuid import UUID

from sample_documents import make_document

from upload_pipeline.database import queue
from upload_pipeline.database.deletion import delete_document
from upload_pipeline.intake.accept import accept_file
from upload_pipeline.intake.receive import receive_upload
from upload_pipeline.intake.reserve import ReservedUpload, reserve_upload
from upload_pipeline.storage.document_objects import remove_document_objects

DATA = make_document("pdf", 1)
WINDOW = timedelta(minutes=20)
WORKER = UUID("5a4d7a7b-0f43-4f0e-9df7-0f5b6b1f3c55")


async def reserve(intake, user, data=DATA, **more) -> ReservedUpload:
    described = {
        "filename": "claim.pdf",
        "file_bytes": len(data),
        "media_type": "application/pdf",
        "file_sha256": sha256(data).hexdigest(),
        "metadata": {},
        "correlation_id": "r-1",
        "window": WINDOW,
    }
    return await reserve_upload(intake, user_id=user, **{**described, **more})


async def row_of(traces, document_id):
    return await traces.db.fetchrow(
        """
        select d.*, j.job_id, j.stage, j.state::text as state, j.priority, j.correlation_id, o.error_code
          from upload_pipeline.documents d
          join upload_pipeline.upload_jobs j using (document_id)
          left join upload_pipeline.job_outcomes o using (job_id) where document_id = $1
        """,
        document_id,
    )


async def arriving(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def send(intake, document_id, data=DATA, *, chunks=None, announced=DATA) -> None:
    """Brings bytes to a document that awaits `announced`."""
    await receive_upload(
        intake,
        document_id=document_id,
        file_bytes=len(announced),
        file_sha256=sha256(announced).hexdigest(),
        chunks=chunks or arriving(data),
    )


async def claim(intake):
    """The one ready job."""
    (job,) = await queue.claim_jobs(
        intake.db, worker_id=WORKER, pool="default", limit=1, after_user=None, ttl=timedelta(seconds=60)
    )
    return job


async def assert_arrived(traces, reserved, *, state="queued") -> None:
    """The bytes are where they belong and nowhere else, nothing is awaited, and the job has nothing to wait for."""
    assert await traces.keys() == {reserved.raw_key}
    assert await traces.store.get_bytes(reserved.raw_key, len(DATA)) == DATA
    row = await row_of(traces, reserved.document_id)
    assert (row["upload_deadline"], row["stage"], row["state"], row["error_code"]) == (None, "queued", state, None)
    assert await traces.jobs() == 1


async def assert_awaited(traces, reserved) -> None:
    """Nothing has been left of what was tried."""
    assert await traces.keys() == set()
    row = await row_of(traces, reserved.document_id)
    assert (row["upload_deadline"], row["state"]) == (reserved.deadline, "queued")


async def snoozed(intake) -> None:
    """The job has looked, has seen nothing, and sleeps."""
    job = await claim(intake)
    await queue.snooze_job(intake.db, job.lease, delay=timedelta(seconds=30))


async def expired(intake) -> None:
    job = await claim(intake)
    await queue.fail_job(intake.db, job.lease, code="UPLOAD_EXPIRED", message="too late", retryable=False)


async def accept_whole(intake, user):
    return await accept_file(
        intake, chunks=arriving(DATA), filename="whole.pdf", user_id=user, metadata={"whole": 1}, correlation_id="whole"
    )


async def delete(intake, document_id) -> None:
    async def remove(deleted) -> None:
        await remove_document_objects(intake.store, document_id=deleted.document_id, raw_key=deleted.raw_key)

    assert await delete_document(intake.db, document_id, remove)
