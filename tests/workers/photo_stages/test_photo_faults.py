"""A crash anywhere changes nothing in the end: steps run twice, zombies, restarts, processes that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from photo_line import CLEAN_FIELDS, PATH, PHOTO, TTL, USER, OpenLine, PhotoLine, equal_rows
from probe_world import environment_of

from upload_pipeline.database import photos, queue
from upload_pipeline.database.queue import ClaimedJob, Lease
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.objects import StoredObject
from upload_pipeline.storage.photo_objects import remove_photo_objects
from upload_workers.steps import Commit

HERE = Path(__file__).parent


@pytest.mark.parametrize("drop", [False, True])
async def test_every_step_run_twice_leaves_what_one_run_leaves(
    open_line: OpenLine, undisturbed: Any, drop: bool
) -> None:
    expected_row, expected_objects = await undisturbed(drop)
    line = await open_line()
    await line.drop_gps(drop)
    job = await line.claim()
    while job.stage != "extracted":
        await line.step(job)
        job = await line.take_over(job)
        job = await line.run(job)
    assert equal_rows(line, await line.row(), expected_row)
    assert await line.objects() == expected_objects
    assert list(line.context.scratch.iterdir()) == []


@pytest.mark.parametrize("stage", PATH[:3])
async def test_a_zombie_writes_no_row_once_another_has_the_job(open_line: OpenLine, stage: str) -> None:
    line = await open_line()
    await line.drop_gps()
    zombie = await line.run_to(await line.claim(), stage)
    other = await line.take_over(zombie)
    before = await line.row()
    with pytest.raises((asyncpg.PostgresError, KeyError)):
        await line.run(zombie)
    assert await line.row() == before
    await line.run_to(other, "extracted")
    after = await line.row(), await line.objects()
    with pytest.raises((asyncpg.PostgresError, KeyError, PipelineError)):
        await line.run(zombie)
    assert (await line.row(), {**await line.objects()}) == after


async def test_a_zombie_of_the_time_before_a_project_kept_its_places_takes_no_original_away(
    open_line: OpenLine,
) -> None:
    line = await open_line()
    await line.drop_gps()
    zombie = await line.run_to(await line.claim(), "uploaded")
    outcome = await line.step(zombie)  # the copy is stored and not committed
    other = await line.take_over(zombie)
    await line.drop_gps(False)
    await line.run_to(other, "extracted")
    assert isinstance(outcome, Commit)
    with pytest.raises(asyncpg.PostgresError) as fenced:
        await outcome.verb(line.context.db, zombie.lease, keep=True, ttl=TTL)
    assert fenced.value.sqlstate == queue.LEASE_LOST
    assert (await line.row())["shared_key"] is None
    assert (await line.objects())[".jpg"] == PHOTO


async def test_a_project_that_begins_to_drop_places_leaves_photos_that_are_past_that(open_line: OpenLine) -> None:
    line = await open_line()
    job = await line.run_to(await line.claim(), "extracting")
    await line.drop_gps()
    await line.run_to(job, "extracted")
    assert (await line.row())["shared_key"] is None
    assert (await line.objects())[".jpg"] == PHOTO


async def test_a_photo_that_is_processed_again_tells_no_place_once_it_has_its_copy(open_line: OpenLine) -> None:
    line = await open_line()
    job = await line.run_to(await line.claim(), "extracted")
    assert "gps" in (await line.row())["exif"]
    await line.drop_gps()
    await queue.fail_job(line.context.db, job.lease, code="INTERNAL", message="stopped", retryable=False)
    await line.admin.execute("select * from upload_pipeline.retry_job($1, 'uploaded')", job.job_id)
    await line.run_to(await line.claim(), "extracting")
    assert (await line.row())["exif"].keys() >= CLEAN_FIELDS
    assert "gps" not in (await line.row())["exif"]


@pytest.mark.parametrize("drop", [False, True])
async def test_a_restart_from_any_stage_gives_the_same(open_line: OpenLine, drop: bool) -> None:
    line = await open_line()
    await line.drop_gps(drop)
    job = await line.run_to(await line.claim(), "extracted")
    expected = await line.row(), await line.objects()
    for stage in PATH[:3]:
        await queue.fail_job(line.context.db, job.lease, code="INTERNAL", message="stopped", retryable=False)
        await line.admin.execute("select * from upload_pipeline.retry_job($1, $2)", job.job_id, str(stage))
        job = await line.run_to(await line.claim(), "extracted")
        assert (await line.row(), await line.objects()) == expected, stage


async def test_an_original_that_is_sent_again_is_not_handed_out(open_line: OpenLine) -> None:
    line = await open_line()
    await line.drop_gps()
    await line.run_to(await line.claim(), "extracted")
    before = await line.row()
    await line.put(PHOTO)  # the upload URL is still good
    assert await line.row() == before
    assert b"GPS" not in (await line.objects())[".shared.jpg"]


class DeletedMeanwhile:
    """A store in which a photo is deleted while an object of it is being written."""

    def __init__(self, line: PhotoLine) -> None:
        self._line = line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._line.context.store, name)

    async def _deleted(self, stored: StoredObject) -> StoredObject:
        db, store = self._line.context.db, self._line.context.store
        kept = await store.get_bytes(stored.key, 10**7)
        await photos.begin_deletion(db, self._line.photo)
        await remove_photo_objects(store, self._line.raw_key)
        await photos.finish_deletion(db, self._line.photo)
        return await store.put_bytes(stored.key, kept)

    async def put_bytes(self, key: str, data: bytes) -> StoredObject:
        return await self._deleted(await self._line.context.store.put_bytes(key, data))

    async def put_file(self, key: str, path: Path) -> StoredObject:
        return await self._deleted(await self._line.context.store.put_file(key, path))


@pytest.mark.parametrize("stage", ["uploaded", "extracting"])
async def test_nothing_is_left_of_a_photo_that_is_deleted_meanwhile(open_line: OpenLine, stage: str) -> None:
    line = await open_line()
    await line.drop_gps()
    job = await line.run_to(await line.claim(), stage)
    deleting = replace(line, context=replace(line.context, store=DeletedMeanwhile(line)))  # type: ignore[arg-type]
    with pytest.raises(asyncpg.PostgresError) as fenced:
        await deleting.run(job)
    assert fenced.value.sqlstate == queue.LEASE_LOST
    assert await line.objects() == {}
    error = await line.refusal(job)
    assert error.code is ErrorCode.PHOTO_NOT_FOUND


# Processes that are killed.


def start_and_kill(write: str, settings: dict[str, object]) -> None:
    """A process that is killed once it has come to the write."""
    worker = subprocess.Popen(
        [sys.executable, str(HERE / "killable_photo_worker.py"), write],
        env={**os.environ, **environment_of(settings)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline().strip() == write
        finally:
            worker.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    "write",
    [
        "shared",
        pytest.param("commit_photo_copy", marks=pytest.mark.slow),
        "delete",
        pytest.param("thumbnail", marks=pytest.mark.slow),
        "commit_photo_facts",
    ],
)
async def test_a_process_killed_at_any_write_is_followed_by_another_that_ends_alike(
    open_line: OpenLine, undisturbed: Any, database: Any, write: str
) -> None:
    expected_row, expected_objects = await undisturbed(True)
    line = await open_line()
    await line.drop_gps()
    settings = {"home": str(line.context.settings.home), "database_url": database.worker_url}
    await asyncio.to_thread(start_and_kill, write, settings)
    killed = await line.admin.fetchrow("select job_id, lease_token, stage from upload_pipeline.upload_jobs")
    held = ClaimedJob(Lease(killed["job_id"], killed["lease_token"]), line.photo, USER, "photo", killed["stage"], 0, "")
    await line.run_to(await line.take_over(held), "extracted")
    assert equal_rows(line, await line.row(), expected_row)
    assert await line.objects() == expected_objects
