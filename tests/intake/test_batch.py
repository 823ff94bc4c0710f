"""Batches of files: all of them, each with what it came to, or nothing at all."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sample_documents import make_document

from upload_pipeline.database import batches, documents
from upload_pipeline.database.as_user import as_user
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file
from upload_pipeline.intake.batch import BatchTerms, accept_batch, incoming_batch
from upload_pipeline.intake.batch_files import MAX_FILES
from upload_pipeline.intake.staging import Intake
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.store import ObjectStore

KINDS = ("pdf", "docx", "txt", "md", "html")
MAPPING = b'filename,author,tags\n0.pdf,Ines Varga,"roof,storm"\n2.txt,Yuki Brandt,\nnobody.pdf,x,\n'


async def arriving(data: bytes, size: int = 4000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def terms(mapping: bytes | None = None, **more: Any) -> BatchTerms:
    return BatchTerms(mapping, max_mapping_bytes=10_000, **more)


async def take(
    intake: Intake, user: UUID, files: list[tuple[str, bytes]], mapping: bytes | None = None, **more: Any
) -> tuple[UUID, list[batches.BatchMember]]:
    batch = uuid4()
    async with incoming_batch(intake, user_id=user, correlation_id="c-1") as incoming:
        for name, data in files:
            await incoming.add_stream(name, arriving(data))
        return batch, await accept_batch(incoming, batch, terms(mapping, **more))


def mixed() -> list[tuple[str, bytes]]:
    return [(f"{n}.{kind}", make_document(kind, n + 1)) for n, kind in enumerate(KINDS)]


async def status(intake: Intake, user: UUID, batch: UUID) -> batches.BatchStatus:
    async with as_user(intake.db, user) as connection:
        found = await batches.find_batch(connection, batch, default_seconds=60)
    assert found is not None
    return found


async def test_files_become_a_batch_with_their_metadata(intake, user, traces):
    batch, members = await take(intake, user, mixed(), MAPPING, common={"year": 2026, "author": "nobody"})
    assert [(member.filename, member.error_code, member.duplicate) for member in members] == [
        (name, None, False) for name, _ in mixed()
    ]
    assert await traces.keys() == {raw_key(user, member.document_id) for member in members}
    assert await traces.jobs() == 5
    rows = await traces.db.fetch("select filename, metadata, media_type from upload_pipeline.documents")
    metadata = {row["filename"]: json.loads(row["metadata"]) for row in rows}
    assert metadata["0.pdf"] == {"year": 2026, "author": "Ines Varga", "tags": ["roof", "storm"]}
    assert metadata["1.docx"] == {"year": 2026, "author": "nobody"}
    told = await status(intake, user, batch)
    assert (told.total, told.open, told.status, told.failed_members) == (5, 5, "in_progress", ())
    assert told.warnings == ("line 4 of the mapping: there is no file 'nobody.pdf' in the batch",)
    assert told.estimated_completion_at is not None
    assert not list(intake.scratch.glob("*"))


async def test_a_file_that_fails_its_checks_fails_alone(intake, user, traces):
    large = b"words " * 100_000
    mapping = b"filename,date_created\nwrong date.md,yesterday\nfine.txt,2026-01-31\n"
    batch, members = await take(
        intake,
        user,
        [
            ("fine.txt", make_document("txt", 1)),
            ("empty.txt", b""),
            ("../picture.png", b"\x89PNG\r\n\x1a\n" + bytes(100)),
            ("broken.pdf", b"%PDF-1.7\nand nothing else that a reader would know"),
            ("large.txt", large),
            ("wrong date.md", make_document("md", 2)),
        ],
        mapping,
    )
    assert [member.error_code for member in members] == [
        None,
        "EMPTY_FILE",
        "UNSUPPORTED_TYPE",
        "CORRUPT_FILE",
        "FILE_TOO_LARGE",
        "INVALID_METADATA",
    ]
    assert await traces.keys() == {raw_key(user, members[0].document_id)}
    assert await traces.jobs() == 1
    told = await status(intake, user, batch)
    assert (told.processed, told.failed, told.open) == (0, 5, 1)
    assert told.failed_members[1].filename == "picture.png"
    assert "date_created" in told.failed_members[4].error


async def test_a_batch_of_nothing_good_has_failed_at_once(intake, user, traces):
    batch, _ = await take(intake, user, [("a.txt", b""), ("b.txt", b"")])
    told = await status(intake, user, batch)
    assert (told.status, told.failed, told.seconds) == ("failed", 2, 0)
    assert told.completed_at == told.created_at
    assert await traces.keys() == set()


async def test_same_bytes_and_same_names_are_told(intake, user, traces):
    one, two, old = (make_document("txt", n) for n in range(3))
    await take(intake, user, [("old.txt", old)])
    mapping = b"filename,author\na.txt,Ines\nb.txt,Yuki\n"
    batch, members = await take(
        intake, user, [("a.txt", one), ("b.txt", one), ("a.txt", two), ("new.txt", old)], mapping
    )
    assert [member.duplicate for member in members] == [False, True, False, True]
    assert members[0].job_id == members[1].job_id
    assert len(await traces.keys()) == await traces.jobs() == 3
    assert (await status(intake, user, batch)).warnings == (
        '2 files are named "a.txt": each is taken for itself, and a row of the mapping holds for all of them',
        '"b.txt" has the same bytes as "a.txt": they are one document',
        '"new.txt" was sent before: the document stays as it is, with the metadata that it has',
    )
    rows = await traces.db.fetch("select metadata ->> 'author' as author from upload_pipeline.documents order by 1")
    assert [row["author"] for row in rows] == ["Ines", "Ines", None]


async def test_a_hundred_files_are_a_batch_and_one_more_is_none(intake, user, traces):
    files = [(f"{n}.txt", f"file number {n}".encode()) for n in range(MAX_FILES + 1)]
    with pytest.raises(PipelineError) as caught:
        await take(intake, user, files)
    assert caught.value.code is ErrorCode.BATCH_TOO_LARGE
    assert "101 files" in caught.value.message
    assert await traces.nothing()
    _, members = await take(intake, user, files[:-1])
    assert len(members) == await traces.jobs() == MAX_FILES


async def test_a_mapping_that_cannot_be_read_leaves_nothing(intake, user, traces):
    with pytest.raises(PipelineError) as caught:
        await take(intake, user, mixed(), b"author\nx\n")
    assert caught.value.code is ErrorCode.INVALID_MAPPING
    assert await traces.nothing()


async def test_files_of_this_machine_are_a_batch_too(intake, user, traces, tmp_path):
    for name, data in mixed():
        (tmp_path / name).write_bytes(data)
    batch = uuid4()
    async with incoming_batch(intake, user_id=user, correlation_id="c-1") as incoming:
        for name in [name for name, _ in mixed()] + ["missing.txt"]:
            await incoming.add_path(tmp_path / name)
        members = await accept_batch(incoming, batch, terms(MAPPING))
    assert [member.error_code for member in members] == [None] * 5 + ["FILE_NOT_FOUND"]
    assert await traces.keys() == {raw_key(user, member.document_id) for member in members[:5]}


# failures of the whole


@dataclass
class FailingBackend:
    """A store whose nth call of a method fails, before or after it has done its work."""

    inner: Any
    method: str
    countdown: int
    after: bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _count(self, method: str, *, after: bool) -> None:
        if method == self.method and after == self.after:
            self.countdown -= 1
            if self.countdown == 0:
                raise OSError(errno.EIO, "the disk failed")

    async def write(self, key: str, blocks: AsyncIterator[bytes]) -> None:
        self._count("write", after=False)
        await self.inner.write(key, blocks)
        self._count("write", after=True)

    async def move(self, source: str, target: str) -> None:
        self._count("move", after=False)
        await self.inner.move(source, target)
        self._count("move", after=True)

    async def read(self, key: str, block_bytes: int) -> AsyncIterator[bytes]:
        self._count("read", after=False)
        async for block in self.inner.read(key, block_bytes):
            yield block
        self._count("read", after=True)


@dataclass
class FailingDatabase:
    """A database whose answer to `create_batch` is lost, before or after the work, so many times."""

    inner: Any
    error: Exception
    after: bool
    times: int = 1

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        failing = "create_batch" in query and self.times > 0
        self.times -= failing
        if failing and not self.after:
            raise self.error
        rows: list[Any] = await self.inner.fetch(query, *args)
        if failing:
            raise self.error
        return rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


async def assert_whole(traces: Any, intake: Intake, user: UUID) -> None:
    """The next try makes the batch, once."""
    _, members = await take(intake, user, mixed())
    assert [member.duplicate for member in members] == [False] * 5
    assert await traces.keys() == {raw_key(user, member.document_id) for member in members}
    assert await traces.jobs() == 5


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("method", "countdown"), [("write", 1), ("write", 4), ("read", 2), ("move", 1), ("move", 5)])
async def test_a_store_that_fails_leaves_nothing(intake, user, traces, method, countdown, after):
    broken = replace(intake, store=ObjectStore(FailingBackend(intake.store.backend, method, countdown, after)))
    with pytest.raises(PipelineError) as caught:
        await take(broken, user, mixed())
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert await traces.nothing()
    assert not list(intake.scratch.glob("*"))
    await assert_whole(traces, intake, user)


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError("no server"), TimeoutError(), asyncpg.TooManyConnectionsError("too many")]
)
async def test_a_database_that_is_away_leaves_nothing(intake, user, traces, error):
    with pytest.raises(PipelineError) as caught:
        await take(replace(intake, db=FailingDatabase(intake.db, error, after=False)), user, mixed())
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert await traces.nothing()
    await assert_whole(traces, intake, user)


@pytest.mark.parametrize("after", [False, True])
async def test_a_database_that_comes_back_makes_the_batch_once(intake, user, traces, after):
    lost = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    patient = replace(intake, db=FailingDatabase(intake.db, lost, after), retry_seconds=5.0)
    batch, members = await take(patient, user, mixed())
    assert await traces.keys() == {raw_key(user, member.document_id) for member in members}
    assert await traces.jobs() == 5
    assert await traces.db.fetchval("select count(*) from upload_pipeline.batches") == 1
    assert (await status(intake, user, batch)).total == 5


async def test_an_answer_that_is_lost_for_good_leaves_a_whole_batch(intake, user, traces):
    lost = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    with pytest.raises(PipelineError):
        await take(replace(intake, db=FailingDatabase(intake.db, lost, after=True)), user, mixed())
    assert await traces.keys() == {raw_key(user, document) for document in await traces.documents()}
    assert await traces.jobs() == 5


async def take_streams(intake: Intake, user: UUID, streams: list[AsyncIterator[bytes]]) -> None:
    async with incoming_batch(intake, user_id=user, correlation_id="c-1") as incoming:
        for stream in streams:
            await incoming.add_stream("unnamed", stream)
        await accept_batch(incoming, uuid4(), terms())


async def breaking_off(data: bytes) -> AsyncIterator[bytes]:
    yield data[:100]
    raise ConnectionResetError("the client is gone")


async def test_a_sender_that_goes_leaves_nothing(intake, user, traces):
    with pytest.raises(ConnectionResetError):
        await take_streams(intake, user, [*map(arriving, dict(mixed()).values()), breaking_off(b"words " * 100)])
    assert await traces.nothing()
    assert not list(intake.scratch.glob("*"))


async def test_a_sender_whose_form_is_wrong_fails_the_batch_and_not_the_file(intake, user, traces):
    async def misformed() -> AsyncIterator[bytes]:
        yield b"some words"
        raise PipelineError(ErrorCode.CORRUPT_FILE, "a code that a file might have too")

    with pytest.raises(PipelineError, match="a code"):
        await take_streams(intake, user, [arriving(make_document("txt", 1)), misformed()])
    assert await traces.nothing()


@pytest.mark.parametrize("moment", ["receiving", "opening", "accepting"])
async def test_a_batch_that_is_cancelled_leaves_nothing(intake, user, traces, moment):
    reached = asyncio.Event()

    async def inspect(_path: Path, _media_type: str) -> None:
        if moment == "opening":
            reached.set()
            await asyncio.sleep(60)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"some words"
        if moment == "receiving":
            reached.set()
            await asyncio.sleep(60)

    @dataclass
    class Stalling:
        inner: Any

        async def fetch(self, query: str, *args: Any) -> list[Any]:
            if "create_batch" in query:
                reached.set()
                await asyncio.sleep(60)
            return list(await self.inner.fetch(query, *args))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    slow = replace(intake, inspect=inspect, db=Stalling(intake.db))

    streams = [*(arriving(make_document("txt", n)) for n in range(3)), stalling()]
    task = asyncio.create_task(take_streams(slow, user, streams))
    await asyncio.wait_for(reached.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await traces.nothing()
    assert not list(intake.scratch.glob("*"))


async def test_a_batch_and_single_files_of_the_same_bytes_at_once(intake, user, traces):
    files = [(f"{n}.txt", make_document("txt", n)) for n in range(6)]

    async def single(name: str, data: bytes) -> None:
        await accept_file(
            intake, chunks=arriving(data), filename=name, user_id=user, metadata={}, correlation_id="single"
        )

    await asyncio.gather(
        take(intake, user, files), take(intake, user, files[::-1]), *(single(*one) for one in files[::2])
    )
    assert await traces.keys() == {raw_key(user, document) for document in await traces.documents()}
    assert await traces.jobs() == len(await traces.documents()) == 6


async def test_bytes_whose_document_is_being_deleted_fail_alone_and_leave_no_object(intake, user, traces):
    (first,) = (await take(intake, user, [("a.txt", make_document("txt", 1))]))[1]
    await documents.begin_deletion(intake.db, first.document_id)
    await traces.store.delete([raw_key(user, first.document_id)])
    _, (refused, taken) = await take(
        intake, user, [("a.txt", make_document("txt", 1)), ("b.txt", make_document("txt", 2))]
    )
    assert (refused.error_code, taken.error_code) == ("INVALID_STATE", None)
    assert await traces.keys() == {raw_key(user, taken.document_id)}
