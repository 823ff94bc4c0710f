"""The steps of photos: what they wait for and refuse, and that a crash anywhere changes nothing in the end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from clamd_server import INFECTED
from photo_files import PLACE, exif_of, jpeg, picture, png, with_segment
from PIL import Image
from PIL.ExifTags import IFD
from probe_world import FAST, environment_of, until
from prometheus_client import generate_latest

from upload_pipeline.database import photos, queue
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.queue import Advance, ClaimedJob, Lease
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.photo_types import JPEG, PNG
from upload_pipeline.providers.calls import MeasuredPhotoReader, ProviderCalls
from upload_pipeline.providers.local_photo_reader import LocalPhotoReader
from upload_pipeline.settings import load_settings
from upload_pipeline.stages import PHOTO_STAGES
from upload_pipeline.storage.objects import StoredObject
from upload_pipeline.storage.photo_keys import photo_key, shared_key, thumbnail_key
from upload_pipeline.storage.photo_objects import remove_photo_objects
from upload_pipeline.storage.store import open_store
from upload_pipeline.storage.virus_scan import VirusScanner
from upload_workers.pipelines import STEPS
from upload_workers.process import running_worker
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

HERE = Path(__file__).parent
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


@pytest.fixture(scope="module")
def reader() -> Any:
    reader = LocalPhotoReader(30.0, 512 * 1024**2, 20_000_000)
    yield reader
    reader.close()


OpenLine = Callable[..., Awaitable[PhotoLine]]


@pytest.fixture
async def open_line(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, reader: LocalPhotoReader
) -> AsyncIterator[OpenLine]:
    """Announces a photo, and stores its bytes unless they are to be awaited."""
    settings = load_settings(**{**FAST, "home": tmp_path, "database_url": database.worker_url})
    pool = await open_pool(database.worker_url, connection_options(settings), size=3)
    store = open_store(settings.effective_storage_url)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    organization = await admin.fetchval("select upload_pipeline.add_organization('Roofs')")
    await admin.execute("select upload_pipeline.set_member($1, $2, 'owner')", organization, USER)
    project = await admin.fetchval("select upload_pipeline.add_project($1, 'Hail')", organization)
    context = StepContext(
        pool,
        store,
        None,
        None,
        settings,
        scratch,
        photos=MeasuredPhotoReader(reader, ProviderCalls()),  # type: ignore[arg-type]
    )

    async def begin(
        data: bytes = PHOTO,
        media_type: str = JPEG,
        *,
        stored: bool = True,
        window: float = 900,
        photo: UUID | None = None,
    ) -> PhotoLine:
        photo = photo or uuid4()
        key = photo_key(project, DAY, photo, media_type)
        await photos.reserve_photo(
            pool,
            photo_id=photo,
            user_id=USER,
            project_id=project,
            file_name="roof.jpg",
            media_type=media_type,
            file_bytes=len(data),
            raw_key=key,
            window=timedelta(seconds=window),
        )
        line = PhotoLine(context, admin, photo, key)
        if stored:
            await line.put(data)
        return line

    yield begin
    await pool.close()


# What the first step waits for and refuses.


async def test_bytes_that_are_not_there_are_waited_for_until_the_deadline(open_line: OpenLine) -> None:
    line = await open_line(stored=False)
    job = await line.claim()
    outcome = await line.step(job)
    assert isinstance(outcome, Snooze)
    assert outcome.delay == timedelta(seconds=1)
    await line.admin.execute("update upload_pipeline.photos set upload_deadline = now() - interval '1 s'")
    error = await line.refusal(job)
    assert (error.code, error.retryable) == (ErrorCode.UPLOAD_EXPIRED, False)
    assert "roof.jpg" in error.message
    await line.put(PHOTO)
    assert (await line.run(job)).stage == "uploaded"


@pytest.mark.parametrize("data", [PHOTO[:-1], PHOTO + b"\x00"], ids=["shorter", "longer"])
async def test_another_length_is_refused(open_line: OpenLine, data: bytes) -> None:
    line = await open_line(stored=False)
    await line.put(data)
    error = await line.refusal(await line.claim())
    assert (error.code, error.retryable) == (ErrorCode.CHECKSUM_MISMATCH, False)
    assert error.details["found"] == len(data)


@pytest.mark.parametrize("data", [png(picture(300, 300)), b"%PDF-1.7\n" + PHOTO, b"<html>" + PHOTO])
async def test_another_type_is_refused(open_line: OpenLine, data: bytes) -> None:
    line = await open_line(data)
    assert (await line.refusal(await line.claim())).code is ErrorCode.TYPE_MISMATCH


async def test_infected_bytes_are_removed(open_line: OpenLine, clamd_url: str) -> None:
    line = await open_line(PHOTO + INFECTED)
    guarded = replace(line, context=replace(line.context, scanner=VirusScanner(clamd_url, 20.0)))
    assert (await guarded.refusal(await line.claim())).code is ErrorCode.MALWARE_FOUND
    assert await line.objects() == {}


async def test_bytes_wait_for_a_scanner_that_is_away_and_pass_one_that_finds_nothing(
    open_line: OpenLine, clamd_url: str
) -> None:
    line = await open_line()
    job = await line.claim()
    away = replace(line, context=replace(line.context, scanner=VirusScanner("tcp://127.0.0.1:9", 1.0)))
    assert isinstance(await away.step(job), Snooze)
    there = replace(line, context=replace(line.context, scanner=VirusScanner(clamd_url, 20.0)))
    assert (await there.run(job)).stage == "uploaded"


# The whole of it.


async def test_a_photo_becomes_a_row_and_a_thumbnail(open_line: OpenLine) -> None:
    line = await open_line()
    await line.run_to(await line.claim(), "extracted")
    row, objects = await line.row(), await line.objects()
    assert (row["width"], row["height"], row["warnings"], row["shared_key"]) == (500, 700, [], None)
    assert row["exif"]["gps"] == {"latitude": -33.8569, "longitude": -70.650972222, "altitude_m": -12.5}
    assert (row["file_bytes"], row["file_sha256"]) == (len(PHOTO), sha256(PHOTO).hexdigest())
    assert row["thumbnail_key"] == thumbnail_key(line.raw_key)
    assert objects[".jpg"] == PHOTO
    with Image.open(io.BytesIO(objects[".thumbnail.jpg"])) as thumbnail:
        assert thumbnail.size == (366, 512)
    assert set(objects) == {".jpg", ".thumbnail.jpg"}
    assert list(line.context.scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "media_type", "ending"), [(PHOTO, JPEG, ".jpg"), (png(exif=exif_of(place=PLACE)), PNG, ".png")]
)
async def test_a_project_may_have_photos_without_their_place(
    open_line: OpenLine, tmp_path: Path, data: bytes, media_type: str, ending: str
) -> None:
    line = await open_line(data, media_type)
    await line.drop_gps()
    await line.run_to(await line.claim(), "extracted")
    row, objects = await line.row(), await line.objects()
    assert set(objects) == {f".shared{ending}", ".thumbnail.jpg"}, "the original stays"
    copy = objects[f".shared{ending}"]
    assert row["shared_key"] == shared_key(line.raw_key)
    assert (row["file_bytes"], row["file_sha256"]) == (len(copy), sha256(copy).hexdigest())
    assert "gps" not in row["exif"]
    assert row["exif"].keys() >= CLEAN_FIELDS
    with Image.open(io.BytesIO(copy)) as cleaned, Image.open(io.BytesIO(data)) as original:
        assert cleaned.tobytes() == original.tobytes()
        assert (bool(original.getexif().get_ifd(IFD.GPSInfo)), cleaned.getexif().get_ifd(IFD.GPSInfo)) == (True, {})
    assert b"GPS" not in copy
    await remove_photo_objects(line.context.store, line.raw_key)
    assert await line.objects() == {}


async def test_a_bucket_serves_as_well(open_line: OpenLine, s3_bucket: str) -> None:
    local = await open_line(stored=False)
    line = replace(local, context=replace(local.context, store=open_store(f"s3://{s3_bucket}/some/prefix")))
    await line.put(PHOTO)
    await line.drop_gps()
    await line.run_to(await line.claim(), "extracted")
    objects = await line.objects()
    assert set(objects) == {".shared.jpg", ".thumbnail.jpg"}
    assert (await line.row())["file_sha256"] == sha256(objects[".shared.jpg"]).hexdigest()


def listed_by_exiftool(path: Path) -> str:
    command = [shutil.which("exiftool") or "", "-a", "-G1", "-ee3", "-U", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool (libimage-exiftool-perl) is not installed")
async def test_exiftool_finds_no_place_in_what_is_stored(open_line: OpenLine, tmp_path: Path) -> None:
    line = await open_line(with_segment(PHOTO, 0xE6, b"GoPro\x00" + b"GPS5" * 20))
    await line.drop_gps()
    await line.run_to(await line.claim(), "extracted")
    for name, content in (await line.objects()).items():
        path = tmp_path / f"object{name}"
        path.write_bytes(content)
        assert "GPS" not in await asyncio.to_thread(listed_by_exiftool, path)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (PHOTO[:-4000], ErrorCode.CORRUPT_IMAGE),
        (jpeg(Image.new("L", (6000, 4000))), ErrorCode.IMAGE_TOO_LARGE),
    ],
)
@pytest.mark.parametrize("drop", [False, True])
async def test_what_cannot_be_decoded_is_refused(open_line: OpenLine, data: bytes, code: ErrorCode, drop: bool) -> None:
    line = await open_line(data)
    await line.drop_gps(drop)
    job = await line.run_to(await line.claim(), "extracting")
    error = await line.refusal(job)
    assert (error.code, error.retryable) == (code, False)
    assert (await line.row())["width"] is None


async def test_whatever_exif_holds_can_be_stored(open_line: OpenLine) -> None:
    exif = exif_of({271: "Ma\x00ker\x01 \u00fc", 272: b"\xff\xfe\x00"}, {33434: float("nan"), 37386: 1e300, 34855: -1})
    line = await open_line(jpeg(exif=exif))
    await line.run_to(await line.claim(), "extracted")
    assert (await line.row())["exif"]["camera_make"] == "Ma"


async def test_a_photo_that_goes_between_two_steps_is_named(open_line: OpenLine) -> None:
    line = await open_line()
    job = await line.run_to(await line.claim(), "extracting")
    await line.context.store.delete([line.raw_key])
    assert (await line.refusal(job)).code is ErrorCode.OBJECT_MISSING


# Crashes, zombies, restarts.


@pytest.fixture
async def undisturbed(open_line: OpenLine) -> Any:
    """The row and the objects of a photo that nothing happened to."""

    async def of(drop: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
        line = await open_line()
        await line.drop_gps(drop)
        job = await line.run_to(await line.claim(), "extracted")
        found = await line.row(), await line.objects()
        await remove_photo_objects(line.context.store, line.raw_key)
        await line.admin.execute("delete from upload_pipeline.upload_jobs where job_id = $1", job.job_id)
        return found

    return of


def equal_rows(line: PhotoLine, row: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two photos' rows say the same, their own ids left out."""
    keys = ("thumbnail_key", "shared_key")
    return {name: value if name not in keys else bool(value) for name, value in row.items()} == {
        name: value if name not in keys else bool(value) for name, value in expected.items()
    }


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


async def test_a_worker_takes_a_photo_that_comes_late_through_its_stages(open_line: OpenLine, database: Any) -> None:
    line = await open_line(stored=False)

    async def extracted() -> Any:
        return (await line.row())["thumbnail_key"]

    async with running_worker(line.context.settings, database.worker_url) as runner:
        await line.put(PHOTO)
        await photos.announce_photo(line.context.db, line.photo, "uploaded")
        await until(extracted, "photo extracted", 20.0)
        shown = generate_latest(runner.metrics.registry).decode()
    assert 'provider_calls_total{operation="read_photo",outcome="ok",provider="local"} 1.0' in shown
    assert (await line.row())["width"] == 500
