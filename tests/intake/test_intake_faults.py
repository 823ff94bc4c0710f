"""Each thing that intake relies on fails at each moment: no row without its object, no object without its row."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from failing_parts import FailingBackend, HookedDatabase, raising

from upload_pipeline.database import documents
from upload_pipeline.database.deletion import delete_document
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file, accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.storage.document_objects import remove_document_objects
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.orphans import sweep
from upload_pipeline.storage.store import ObjectStore

DATA = b"The same words each time.\n" * 2000


async def whole() -> AsyncIterator[bytes]:
    yield DATA


@pytest.fixture(params=["stream", "path"])
def take(request, user, tmp_path):
    """Takes the same bytes in, by either way."""
    path = tmp_path / "words.txt"
    path.write_bytes(DATA)

    async def stream(intake: Intake) -> documents.AcceptedDocument:
        return await accept_file(
            intake, chunks=whole(), filename="words.txt", user_id=user, metadata={}, correlation_id=""
        )

    async def local(intake: Intake) -> documents.AcceptedDocument:
        return await accept_path(intake, path=path, user_id=user, metadata={}, correlation_id="")

    return stream if request.param == "stream" else local


async def assert_whole(traces) -> None:
    """One document, one job, its bytes, and nothing else."""
    (document,) = await traces.documents()
    key = raw_key(traces.user_id, document)
    assert await traces.keys() == {key}
    assert await traces.store.get_bytes(key, len(DATA)) == DATA
    assert await traces.jobs() == 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["write", "move"])
async def test_a_store_that_fails_leaves_nothing_and_the_next_try_works(intake, traces, take, method, after):
    broken = ObjectStore(FailingBackend(intake.store.backend, method, after))
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, store=broken))
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert await traces.nothing()
    assert not (await take(intake)).duplicate
    await assert_whole(traces)


@pytest.mark.parametrize("after", [False, True])
async def test_a_store_that_cannot_be_read_back_leaves_nothing(intake, user, traces, after):
    broken = replace(intake, store=ObjectStore(FailingBackend(intake.store.backend, "read", after)))
    with pytest.raises(PipelineError) as caught:
        await accept_file(broken, chunks=whole(), filename="a.txt", user_id=user, metadata={}, correlation_id="")
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert await traces.nothing()
    assert not list(intake.scratch.iterdir())


async def test_a_document_stays_accepted_though_its_object_cannot_be_looked_at(intake, traces, take):
    broken = ObjectStore(FailingBackend(intake.store.backend, "head"))
    await take(replace(intake, store=broken))
    await assert_whole(traces)


async def test_a_file_that_does_not_open_leaves_nothing(intake, traces, take):
    refusal = PipelineError(ErrorCode.CORRUPT_FILE, "does not open")

    async def inspect(_path: Path, _media_type: str) -> None:
        raise refusal

    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, inspect=inspect))
    assert caught.value is refusal
    assert await traces.nothing()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("no server"),
        TimeoutError(),
        asyncpg.InterfaceError("pool is closing"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.TooManyConnectionsError("sorry, too many clients already"),
        asyncpg.QueryCanceledError("canceling statement due to statement timeout"),
    ],
)
async def test_a_database_that_is_gone_before_the_move_leaves_nothing(intake, traces, take, error):
    gone = HookedDatabase(intake.db, before={("find_duplicate", 1): raising(error)})
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, db=gone))
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert await traces.nothing()
    await take(intake)
    await assert_whole(traces)


async def test_a_database_without_the_schema_says_how_to_make_it(intake, traces, take):
    missing = HookedDatabase(
        intake.db, before={("find_duplicate", 1): raising(asyncpg.UndefinedFunctionError("no such function"))}
    )
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, db=missing))
    assert caught.value.code is ErrorCode.MIGRATIONS_PENDING
    assert "migrate" in caught.value.message


async def test_a_database_that_fails_after_the_move_leaves_nothing(intake, traces, take):
    failing = HookedDatabase(intake.db, before={("accept_document", 1): raising(ConnectionResetError("gone"))})
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, db=failing))
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert await traces.nothing()
    await take(intake)
    await assert_whole(traces)


async def test_an_error_without_a_name_comes_out_as_it_is_and_leaves_nothing(intake, traces, take):
    failing = HookedDatabase(intake.db, before={("accept_document", 1): raising(asyncpg.DivisionByZeroError("1/0"))})
    with pytest.raises(asyncpg.DivisionByZeroError):
        await take(replace(intake, db=failing))
    assert await traces.nothing()


async def test_an_answer_that_was_lost_leaves_the_document_whole(intake, traces, take):
    lost = HookedDatabase(intake.db, after={("accept_document", 1): raising(ConnectionResetError("gone"))})
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, db=lost))
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    await assert_whole(traces)


async def test_a_database_that_comes_back_is_waited_for(intake, traces, take):
    gone = raising(ConnectionRefusedError("no server"))
    away = HookedDatabase(intake.db, before={("accept_document", 1): gone, ("accept_document", 2): gone})
    await take(replace(intake, db=away, retry_seconds=30.0))
    assert away.calls["accept_document"] == 3
    await assert_whole(traces)


async def test_connections_that_the_server_ends_after_the_move_are_replaced(intake, traces, take, database):
    async def end_them() -> None:
        with psycopg.connect(database.admin_url, autocommit=True) as admin:
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where usename = 'upload_worker' and datname = current_database()"
            )

    ended = HookedDatabase(intake.db, before={("accept_document", 1): end_them})
    await take(replace(intake, db=ended, retry_seconds=30.0))
    await assert_whole(traces)


async def test_where_the_database_cannot_be_asked_the_object_is_left_to_the_sweep(intake, traces, take):
    gone = raising(ConnectionRefusedError("no server"))
    away = HookedDatabase(
        intake.db,
        before={("accept_document", 1): gone, **{("documents", n): gone for n in (2, 3)}},
    )
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, db=away))
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert len(await traces.keys()) == 1
    assert await traces.documents() == []
    await swept(traces)
    assert await traces.nothing()


async def swept(traces) -> None:
    async def known(document_ids: list[Any]) -> set[Any]:
        return await documents.existing_documents(traces.db, document_ids)

    await sweep(traces.store, known, now=datetime.now(UTC) + timedelta(hours=2), grace=timedelta(hours=1))


async def test_a_cancelled_intake_leaves_all_or_nothing(intake, traces, take):
    for verb in ("find_duplicate", "accept_document"):
        reached = asyncio.Event()

        async def wait_for_ever(reached: asyncio.Event = reached) -> None:
            reached.set()
            await asyncio.sleep(3600)

        task = asyncio.create_task(take(replace(intake, db=HookedDatabase(intake.db, {(verb, 1): wait_for_ever}))))
        await asyncio.wait_for(reached.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await traces.nothing()


# Two at once.


async def test_one_that_fails_leaves_the_object_of_another_that_was_accepted_meanwhile(intake, traces, take):
    async def other_and_fail() -> None:
        assert not (await take(intake)).duplicate
        raise asyncpg.DivisionByZeroError("1/0")

    with pytest.raises(asyncpg.DivisionByZeroError):
        await take(replace(intake, db=HookedDatabase(intake.db, before={("accept_document", 1): other_and_fail})))
    await assert_whole(traces)


async def test_one_that_removes_an_object_puts_it_back_where_another_was_accepted_meanwhile(intake, traces, take):
    async def other() -> None:
        assert not (await take(intake)).duplicate

    # The second look at the documents is the one that decides to remove the object; the other comes right after it.
    hooked = HookedDatabase(
        intake.db,
        before={("accept_document", 1): raising(asyncpg.DivisionByZeroError("1/0"))},
        after={("documents", 2): other},
    )
    with pytest.raises(asyncpg.DivisionByZeroError):
        await take(replace(intake, db=hooked))
    assert hooked.calls["documents"] == 3
    await assert_whole(traces)


async def test_one_that_is_accepted_puts_back_what_another_has_removed(intake, traces, take):
    async def removed() -> None:
        await traces.store.delete(await traces.keys())

    await take(replace(intake, db=HookedDatabase(intake.db, after={("accept_document", 1): removed})))
    await assert_whole(traces)


# Bytes of a document that is being deleted.


async def test_bytes_of_a_document_that_is_being_deleted_are_taken_once_it_is_gone(intake, traces, take):
    first = await take(intake)
    deleted = await documents.begin_deletion(intake.db, first.document_id)
    assert deleted is not None
    with pytest.raises(PipelineError) as caught:
        await take(intake)
    assert caught.value.code is ErrorCode.INVALID_STATE
    assert "being deleted" in caught.value.message
    assert "again" in caught.value.message
    await remove_document_objects(traces.store, document_id=deleted.document_id, raw_key=deleted.raw_key)
    assert await traces.keys() == set()
    await documents.finish_deletion(intake.db, first.document_id)
    again = await take(intake)
    assert not again.duplicate
    assert again.document_id == first.document_id
    assert again.job_id != first.job_id
    await assert_whole(traces)


async def test_a_deletion_that_begins_after_the_look_up_is_refused_and_leaves_nothing(intake, traces, take):
    async def accepted_and_half_deleted() -> None:
        other = await take(intake)
        await documents.begin_deletion(intake.db, other.document_id)

    hooked = HookedDatabase(intake.db, before={("accept_document", 1): accepted_and_half_deleted})
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, db=hooked))
    assert caught.value.code is ErrorCode.INVALID_STATE
    assert await traces.keys() == set()


async def test_a_deletion_between_move_and_row_costs_the_new_document_nothing(intake, traces, take):
    async def accepted_and_deleted() -> None:
        other = await take(intake)

        async def remove(deleted: documents.DeletedDocument) -> None:
            await remove_document_objects(traces.store, document_id=deleted.document_id, raw_key=deleted.raw_key)

        assert await delete_document(intake.db, other.document_id, remove)

    hooked = HookedDatabase(intake.db, before={("accept_document", 1): accepted_and_deleted})
    assert not (await take(replace(intake, db=hooked))).duplicate
    await assert_whole(traces)


# Killed.

_KILLED = """
import asyncio, os, pathlib, signal, sys, uuid
from upload_pipeline.database.pools import open_pool
from upload_pipeline.intake.accept import accept_file, accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.storage.store import open_store

url, root, scratch, user, path, way, moment = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer:
    def __init__(self, pool):
        self.pool = pool
    async def fetchrow(self, query, *args):
        if moment in query:
            die()
        row = await self.pool.fetchrow(query, *args)
        if moment == "answered" and "accept_document" in query:
            die()
        return row

async def inspect(path, media_type):
    if moment == "inspect":
        die()

async def chunks():
    data = pathlib.Path(path).read_bytes()
    yield data[:20_000]
    if moment == "stream":
        await asyncio.sleep(0.2)
        die()
    yield data[20_000:]

async def main():
    pool = await open_pool(url, size=1)
    intake = Intake(Killer(pool), open_store("file://" + root), inspect, 10**6, pathlib.Path(scratch))
    common = dict(user_id=uuid.UUID(user), metadata={}, correlation_id="")
    if way == "stream":
        await accept_file(intake, chunks=chunks(), filename="words.txt", **common)
    else:
        await accept_path(intake, path=pathlib.Path(path), **common)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("way", "moment"),
    [
        ("stream", "stream"),
        ("stream", "find_duplicate"),
        ("stream", "inspect"),
        ("stream", "accept_document"),
        ("path", "accept_document"),
        ("path", "answered"),
    ],
)
async def test_a_killed_intake_leaves_what_the_sweep_removes(database, intake, user, traces, tmp_path, way, moment):
    path = tmp_path / "words.txt"
    path.write_bytes(DATA)
    arguments = [database.worker_url, str(tmp_path / "objects"), str(tmp_path / "scratch"), str(user), str(path)]
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _KILLED, *arguments, way, moment],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    await swept(traces)
    if moment == "answered":
        await assert_whole(traces)
    else:
        assert await traces.nothing()
    accepted = await accept_path(intake, path=path, user_id=user, metadata={}, correlation_id="")
    assert accepted.duplicate is (moment == "answered")
    await assert_whole(traces)
