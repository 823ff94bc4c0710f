"""A photo whose job is led step by step by hand."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from photo_files import PLACE, exif_of, jpeg, picture

from upload_pipeline.database import queue
from upload_pipeline.database.queue import Advance, ClaimedJob
from upload_pipeline.errors import PipelineError
from upload_pipeline.stages import PHOTO_STAGES
from upload_workers.pipelines import STEPS
from upload_workers.steps import Commit, Outcome, StepContext

TTL = timedelta(seconds=60)
USER = UUID("7d0b8f5e-4a0e-4d53-8f2e-3f1d6c1a9b55")
DAY = date(2031, 5, 17)
PATH = [row.stage for row in PHOTO_STAGES]
PHOTO = jpeg(picture(700, 500), exif=exif_of({271: "Maker", 272: "Model 5", 274: 6}, place=PLACE), xmp=b"<GPS/>")
CLEAN_FIELDS = {"camera_make", "camera_model", "captured_at", "flash", "orientation", "width", "height"}


@dataclass(frozen=True)
class PhotoLine:
    """One photo on its way through the steps, each run by hand."""

    context: StepContext
    admin: asyncpg.Connection
    photo: UUID
    raw_key: str

    async def claim(self) -> ClaimedJob:
        (job,) = await queue.claim_jobs(
            self.context.db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL
        )
        return job

    async def step(self, job: ClaimedJob) -> Outcome:
        return await STEPS[job.pipeline, job.stage](job, self.context)

    async def run(self, job: ClaimedJob) -> ClaimedJob:
        """Runs the step of the job's stage and writes its outcome, as the runner does."""
        outcome = await self.step(job)
        if isinstance(outcome, Commit):
            moved = await outcome.verb(self.context.db, job.lease, keep=True, ttl=TTL)
        else:
            following = PATH[PATH.index(job.stage) + 1]  # type: ignore[arg-type]
            asked = Advance(job.lease, job.stage, following, True)
            moved = (await queue.advance_jobs(self.context.db, [asked], ttl=TTL))[job.job_id]
        return replace(job, stage=moved.stage)

    async def run_to(self, job: ClaimedJob, stage: str) -> ClaimedJob:
        while job.stage != stage:
            job = await self.run(job)
        return job

    async def refusal(self, job: ClaimedJob) -> PipelineError:
        with pytest.raises(PipelineError) as caught:
            await self.step(job)
        return caught.value

    async def take_over(self, job: ClaimedJob) -> ClaimedJob:
        """The job's lease ran out: another worker has it."""
        await self.admin.execute(
            "update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 s' where job_id = $1",
            job.job_id,
        )
        assert await queue.reap_expired(self.context.db) == 1
        await self.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where job_id = $1", job.job_id)
        assert await queue.promote_due(self.context.db) == 1
        return await self.claim()

    async def put(self, data: bytes) -> None:
        """Bytes that come to the store by themselves, as through a presigned URL."""
        await self.context.store.put_bytes(self.raw_key, data)

    async def row(self) -> dict[str, Any]:
        row = dict(
            await self.admin.fetchrow(
                """
                select width, height, exif, warnings, thumbnail_key, shared_key, file_bytes, file_sha256
                  from upload_pipeline.photos where photo_id = $1
                """,
                self.photo,
            )
        )
        return {**row, "exif": json.loads(row["exif"])}

    async def objects(self) -> dict[str, bytes]:
        """The photo's objects by the part of their key that does not name it."""
        store = self.context.store
        keys = [info.key async for info in store.list()]
        return {key.partition(str(self.photo))[2]: await store.get_bytes(key, 10**7) for key in sorted(keys)}

    async def drop_gps(self, drop: bool = True) -> None:
        await self.admin.execute("update upload_pipeline.projects set drop_gps = $1", drop)


OpenLine = Callable[..., Awaitable[PhotoLine]]


def equal_rows(line: PhotoLine, row: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two photos' rows say the same, their own ids left out."""
    keys = ("thumbnail_key", "shared_key")
    return {name: value if name not in keys else bool(value) for name, value in row.items()} == {
        name: value if name not in keys else bool(value) for name, value in expected.items()
    }
