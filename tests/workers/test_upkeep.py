"""What any worker does for all: promotion, reaping, and maintenance of what crashes leave."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from probe_world import ProbeWorld, until_true
from structlog.testing import capture_logs

from upload_pipeline.database import documents, photos, queue
from upload_pipeline.database.batches import RefusedFile, create_batch
from upload_pipeline.database.upkeep_rounds import mark_store
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.keys import markdown_key, parser_output_key, raw_key
from upload_pipeline.storage.photo_keys import photo_key, photo_keys
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_pipeline.storage.store_mark import write_mark
from upload_workers import upkeep
from upload_workers.upkeep import Upkeep, maintain

NOW = timedelta(seconds=-1)
"""A grace that nothing is too young for: a disk's times are as coarse as the kernel's clock."""


@pytest.fixture
async def pool(world: ProbeWorld) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(world.worker_url, min_size=1, max_size=4) as pool:
        yield pool


@pytest.fixture
async def store(tmp_path: Path, pool: asyncpg.Pool) -> ObjectStore:
    """A store that bears the database's mark."""
    store = open_store(f"file://{tmp_path / 'objects'}")
    await write_mark(store, await mark_store(pool, None))
    return store


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def an_upkeep(pool: asyncpg.Pool, store: ObjectStore, scratch: Path, **options: Any) -> Upkeep:
    """That of a worker whose times are a minute where `options` do not say otherwise."""
    minute = dict.fromkeys(("lease_ttl", "maintenance_interval", "orphan_grace", "session_grace"), 60.0)
    return Upkeep(pool, store, scratch, **{**minute, "wake": lambda: None, **options})


async def stored_document(world: ProbeWorld, store: ObjectStore, *, row: bool = True) -> tuple[UUID, UUID, list[str]]:
    """A document with every object that it can have; or, without the row, what an intake that died leaves."""
    user, document = uuid4(), uuid4()
    keys = [key(user, document) for key in (raw_key, parser_output_key, partial(markdown_key, sha256="0" * 64))]
    for key in keys:
        await store.put_bytes(key, b"bytes")
    if row:
        await world.admin.execute(
            """
            insert into upload_pipeline.documents
              (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
            values ($1, $2, 'a.txt', 'text/plain', 5, $3, $4)
            """,
            document,
            user,
            os.urandom(32).hex(),
            keys[0],
        )
    return user, document, keys


async def present(store: ObjectStore, keys: list[str]) -> list[bool]:
    return [await store.head(key) is not None for key in keys]


async def test_orphans_go_and_documents_stay(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    _, _, kept = await stored_document(world, store)
    _, _, orphaned = await stored_document(world, store, row=False)
    report = await maintain(pool, store, scratch, orphan_grace=timedelta(hours=1), session_grace=timedelta(days=1))
    assert report.orphans_removed == 0  # too young: its row may still come
    report = await maintain(pool, store, scratch, orphan_grace=NOW, session_grace=timedelta(days=1))
    assert (report.orphans_removed, report.orphan_bytes) == (3, 15)
    assert await present(store, kept) == [True] * 3
    assert await present(store, orphaned) == [False] * 3
    assert await world.admin.fetchval("select count(*) from upload_pipeline.events where code = 'orphan_removed'") == 1
    again = await maintain(pool, store, scratch, orphan_grace=NOW, session_grace=timedelta(days=1))
    assert again.orphans_removed == 0


@pytest.mark.parametrize("interval", [600.0, 6000.0], ids=["as long as the grace", "longer than the grace"])
async def test_many_workers_look_through_the_store_once_in_an_interval_of_at_most_the_grace(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path, tmp_path: Path, interval: float
) -> None:
    async def old_orphan() -> list[str]:
        _, _, keys = await stored_document(world, store, row=False)
        for key in keys:
            os.utime(tmp_path / "objects" / key, (time.time() - 1200,) * 2)
        return keys

    works = [an_upkeep(pool, store, scratch, orphan_grace=600.0, sweep_interval=interval) for _ in range(3)]
    first = await old_orphan()
    await works[0]._maintain()
    assert await present(store, first) == [False] * 3
    second = await old_orphan()
    for work in works:
        await work._maintain()
    assert await present(store, second) == [True] * 3
    await world.admin.execute("update upload_pipeline.upkeep_rounds set begun_at = begun_at - interval '11 minutes'")
    await works[1]._maintain()
    assert await present(store, second) == [False] * 3


@pytest.mark.parametrize("removed_before_the_crash", [0, 1, 3])
async def test_deletion_that_a_crash_cut_short_is_finished(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path, removed_before_the_crash: int
) -> None:
    _, document, keys = await stored_document(world, store)
    await documents.begin_deletion(pool, document)
    await store.delete(keys[:removed_before_the_crash])
    report = await maintain(pool, store, scratch, orphan_grace=timedelta(hours=1), session_grace=timedelta(days=1))
    assert report.deletions_finished == 0  # under way elsewhere, for all that we know
    await world.admin.execute("update upload_pipeline.documents set deleted_at = deleted_at - interval '2 minutes'")
    report = await maintain(pool, store, scratch, orphan_grace=timedelta(hours=1), session_grace=timedelta(days=1))
    assert report.deletions_finished == 1
    assert await present(store, keys) == [False] * 3
    assert await world.admin.fetchval("select count(*) from upload_pipeline.documents") == 0


async def stored_photo(world: ProbeWorld, store: ObjectStore, *, row: bool = True) -> tuple[UUID, list[str]]:
    """A photo with every object that it can have; or, without the row, what came after its deletion."""
    user, photo = uuid4(), uuid4()
    organization = await world.admin.fetchval("select upload_pipeline.add_organization($1)", f"office {user}")
    await world.admin.execute("select upload_pipeline.set_member($1, $2, 'owner')", organization, user)
    project = await world.admin.fetchval("select upload_pipeline.add_project($1, 'roofs')", organization)
    raw = photo_key(project, date(2026, 11, 21), photo, "image/jpeg")
    keys = list(photo_keys(raw))
    for key in keys:
        await store.put_bytes(key, b"bytes")
    if row:
        await photos.reserve_photo(
            world.admin,
            photo_id=photo,
            user_id=user,
            project_id=project,
            file_name="roof.jpg",
            media_type="image/jpeg",
            file_bytes=5,
            raw_key=raw,
            window=timedelta(minutes=20),
        )
    return photo, keys


async def test_orphans_of_photos_go_and_photos_stay(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    _, kept = await stored_photo(world, store)
    _, _, document = await stored_document(world, store)
    _, orphaned = await stored_photo(world, store, row=False)
    # a grace beyond the photo's deadline, so that the photo itself does not expire
    report = await maintain(pool, store, scratch, orphan_grace=NOW, session_grace=timedelta(days=1))
    assert (report.orphans_removed, report.photos_expired) == (3, 0)
    assert await present(store, kept + document) == [True] * 6
    assert await present(store, orphaned) == [False] * 3


async def test_photos_that_never_came_go_with_whatever_came_too_late(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    _, late = await stored_photo(world, store)
    seen, kept = await stored_photo(world, store)
    await photos.announce_photo(pool, seen, "uploaded")
    for job in await queue.claim_jobs(
        pool, worker_id=uuid4(), pool="default", limit=9, after_user=None, ttl=timedelta(seconds=60)
    ):
        if job.photo_id != seen:
            await queue.fail_job(pool, job.lease, code="UPLOAD_EXPIRED", message="It did not come.", retryable=False)

    async def round_of(grace: timedelta) -> int:
        report = await maintain(pool, store, scratch, orphan_grace=grace, session_grace=timedelta(days=1))
        return report.photos_expired

    await world.admin.execute("update upload_pipeline.photos set upload_deadline = now() - interval '30 minutes'")
    assert await round_of(timedelta(hours=1)) == 0
    assert await round_of(timedelta(minutes=20)) == 1
    assert await round_of(timedelta(minutes=20)) == 0
    assert await present(store, late) == [False] * 3
    assert await present(store, kept) == [True] * 3
    assert await world.admin.fetchval("select array_agg(photo_id) from upload_pipeline.upload_jobs") == [seen]


@pytest.mark.parametrize("removed_before_the_crash", [0, 1, 3])
async def test_a_photos_deletion_that_a_crash_cut_short_is_finished(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path, removed_before_the_crash: int
) -> None:
    photo, keys = await stored_photo(world, store)
    _, kept = await stored_photo(world, store)
    await photos.begin_deletion(pool, photo)
    await store.delete(keys[:removed_before_the_crash])

    async def round_of() -> int:
        hour = timedelta(hours=1)
        return (await maintain(pool, store, scratch, orphan_grace=hour, session_grace=hour)).deletions_finished

    assert await round_of() == 0  # under way elsewhere, for all that we know
    await world.admin.execute("update upload_pipeline.photos set deleted_at = deleted_at - interval '2 minutes'")
    assert await round_of() == 1
    assert await present(store, keys) == [False] * 3
    assert await present(store, kept) == [True] * 3
    assert await world.admin.fetchval("select count(*) from upload_pipeline.upload_jobs") == 1


async def test_temporary_files_of_killed_processes_go_and_young_ones_stay(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    for name, age in (("job-old", 7200), ("job-young", 10), ("other-old", 7200)):
        (scratch / name).mkdir()
        (scratch / name / "file").write_text("x")
        os.utime(scratch / name, (time.time() - age,) * 2)
    (scratch / "job-file").write_text("not a folder")
    os.utime(scratch / "job-file", (time.time() - 7200,) * 2)
    report = await maintain(pool, store, scratch, orphan_grace=timedelta(hours=1), session_grace=timedelta(days=1))
    assert report.scratch_removed == 1
    assert sorted(path.name for path in scratch.iterdir()) == ["job-file", "job-young", "other-old"]


async def test_silent_workers_are_forgotten(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    for silence in (0, 3600):
        worker = uuid4()
        await queue.register_worker(
            pool, worker_id=worker, host="h", pid=1, version="1", pools=["default"], concurrency=1
        )
        await world.admin.execute(
            "update upload_pipeline.workers set last_beat_at = last_beat_at - $2::interval where worker_id = $1",
            worker,
            timedelta(seconds=silence),
        )
    report = await maintain(pool, store, scratch, orphan_grace=NOW, session_grace=timedelta(days=1))
    assert report.workers_forgotten == 1
    assert await world.admin.fetchval("select count(*) from upload_pipeline.workers") == 1


async def test_vectors_that_nobody_uses_go_and_a_round_is_bounded(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_CACHE_BATCH", 10)
    monkeypatch.setattr(upkeep, "_CACHE_BATCHES", 2)
    await world.admin.execute(
        """
        insert into upload_pipeline.embedding_cache
        select gen_random_uuid(), 'm', 3, sha256(i::text::bytea), current_date - i, '[1,2,3]'
          from generate_series(1, 30) i
        """
    )
    options: dict[str, Any] = {"orphan_grace": NOW, "session_grace": timedelta(days=1), "cache_life": timedelta(days=5)}
    assert (await maintain(pool, store, scratch, **options)).vectors_forgotten == 20
    assert (await maintain(pool, store, scratch, **options)).vectors_forgotten == 5
    assert (await maintain(pool, store, scratch, **options)).vectors_forgotten == 0
    assert await world.admin.fetchval("select count(*) from upload_pipeline.embedding_cache") == 5


async def test_part_that_fails_does_not_keep_the_others_from_being_done(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, document, _ = await stored_document(world, store)
    _, _, orphaned = await stored_document(world, store, row=False)
    (scratch / "job-old").mkdir()
    await documents.begin_deletion(pool, document)
    await world.admin.execute("update upload_pipeline.documents set deleted_at = deleted_at - interval '2 minutes'")

    async def refuse(*_args: Any, **_options: Any) -> None:
        raise PipelineError(ErrorCode.STORAGE_DENIED, "no")

    monkeypatch.setattr(upkeep, "remove_document_objects", refuse)
    with pytest.raises(PipelineError, match="no"):
        await maintain(pool, store, scratch, orphan_grace=NOW, session_grace=timedelta(days=1))
    assert await present(store, orphaned) == [False] * 3
    assert list(scratch.iterdir()) == []


async def test_error_in_one_kind_of_upkeep_stops_neither_it_nor_the_others(
    store: ObjectStore, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"promote": 0, "reap": 0, "maintain": 0}

    def failing(name: str) -> Any:
        async def work(*_args: Any, **_options: Any) -> int:
            calls[name] += 1
            raise ConnectionResetError(name)

        return work

    monkeypatch.setattr(upkeep, "PROMOTE_INTERVAL", 0.01)
    monkeypatch.setattr(queue, "promote_due", failing("promote"))
    monkeypatch.setattr(queue, "reap_expired", failing("reap"))
    monkeypatch.setattr(upkeep, "maintain", failing("maintain"))
    work = Upkeep(
        None,  # type: ignore[arg-type]
        store,
        scratch,
        lease_ttl=0.04,
        maintenance_interval=0.01,
        orphan_grace=1.0,
        session_grace=60.0,
        wake=lambda: None,
    )
    task = asyncio.create_task(work.run())
    await until_true(lambda: min(calls.values()) > 2, "each to be tried again")
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_session_that_is_over_goes_with_its_objects_and_one_that_is_not_stays(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    kept: list[str] = []
    gone: list[str] = []
    for end, keys in (("1 hour", kept), ("-2 days", gone)):
        user, _, made = await stored_document(world, store)
        keys.extend(made)
        await world.admin.execute(
            "insert into upload_pipeline.sessions (user_id, token_sha256, expires_at) "
            "values ($1, repeat($2, 64), now() + $3::text::interval)",
            user,
            end[0].replace("-", "0"),
            end,
        )
    await world.admin.execute(
        "update upload_pipeline.sessions set created_at = created_at - interval '1 year', last_seen_at = created_at"
    )

    async def clean() -> tuple[int, int, int]:
        report = await maintain(pool, store, scratch, orphan_grace=NOW, session_grace=timedelta(days=1))
        return report.sessions_removed, report.session_documents_removed, report.deletions_finished

    assert await clean() == (0, 1, 0)
    # as far as anybody knows the deletion is under way elsewhere for a minute
    assert await clean() == (0, 0, 0)
    await world.admin.execute(
        "update upload_pipeline.documents set deleted_at = now() - interval '2 minutes' where deleted_at is not null"
    )
    assert (await clean())[2] == 1
    assert await present(store, gone) == [False] * 3
    assert await present(store, kept) == [True] * 3
    assert await clean() == (1, 0, 0)
    assert await world.admin.fetchval("select count(*) from upload_pipeline.sessions") == 1
    assert await world.admin.fetchval("select count(*) from upload_pipeline.processing_records") == 1


async def test_all_that_is_due_is_promoted_in_one_round_and_wakes_the_worker(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    await world.enqueue(250)
    await world.admin.execute("update upload_pipeline.upload_jobs set state = 'retryable', run_at = now()")
    woken: list[int] = []
    work = an_upkeep(pool, store, scratch, wake=lambda: woken.append(1))
    await work._promote()
    ready = "select count(*) from upload_pipeline.upload_jobs where state = 'queued'"
    assert await world.admin.fetchval(ready) == 250
    assert woken


async def test_all_whose_lease_ran_out_are_taken_back_in_one_round(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path
) -> None:
    await world.enqueue(250)
    for _ in range(2):
        await queue.claim_jobs(
            pool, worker_id=uuid4(), pool="default", limit=200, after_user=None, ttl=timedelta(milliseconds=1)
        )
    await asyncio.sleep(0.01)
    work = an_upkeep(pool, store, scratch)
    await work._reap()
    assert await world.admin.fetchval("select count(*) from upload_pipeline.upload_jobs where state = 'working'") == 0


async def test_a_batch_that_is_over_is_told_once(
    world: ProbeWorld, pool: asyncpg.Pool, store: ObjectStore, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "NOTE_INTERVAL", 0.01)
    user, batch = uuid4(), uuid4()
    refused = RefusedFile("empty.txt", "EMPTY_FILE", "It is empty.")
    await create_batch(pool, batch_id=batch, user_id=user, files=[refused], warnings=[], correlation_id="c-9")
    works = [an_upkeep(pool, store, scratch) for _ in range(3)]
    told = "select count(*) from upload_pipeline.events where code = 'batch_completed' and correlation_id = 'c-9'"
    with capture_logs() as lines:
        tasks = [asyncio.create_task(work.run()) for work in works]
        await until_true(lambda: any(line["event"] == "batch_completed" for line in lines), "the batch to be noticed")
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    (line,) = [line for line in lines if line["event"] == "batch_completed"]
    assert (line["batch_id"], line["status"], line["total"], line["failed"]) == (batch, "failed", 1, 1)
    assert await world.admin.fetchval(told) == 1


async def test_accounts_are_settled_again_and_again_also_after_a_failure(
    pool: asyncpg.Pool, store: ObjectStore, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "ACCOUNT_INTERVAL", 0.01)
    rounds: list[int] = []

    async def account() -> None:
        rounds.append(1)
        raise OSError

    work = an_upkeep(pool, store, scratch, account=account)
    task = asyncio.create_task(work.run())
    await until_true(lambda: len(rounds) > 1, "two rounds")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
