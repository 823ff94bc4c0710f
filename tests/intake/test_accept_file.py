"""Files that arrive as a stream of bytes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from sample_documents import make_document

from upload_pipeline import ids
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file
from upload_pipeline.storage.keys import raw_key


async def arriving(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def take(intake, user, data, filename, **more):
    arguments = {"metadata": {}, "correlation_id": "test", **more}
    return await accept_file(intake, chunks=arriving(data), filename=filename, user_id=user, **arguments)


@pytest.mark.parametrize("kind", ["pdf", "docx", "txt", "md", "html"])
async def test_a_file_becomes_a_document_with_a_job(intake, user, traces, kind):
    data = make_document(kind, 1)
    accepted = await take(
        intake, user, data, f"../claims/note.{kind}", metadata={"tags": ["a"]}, correlation_id="c-1", priority=7
    )
    assert not accepted.duplicate
    assert accepted.document_id == ids.document_id(user, hashlib.sha256(data).hexdigest())
    key = raw_key(user, accepted.document_id)
    assert await traces.keys() == {key}
    assert await traces.store.get_bytes(key, len(data)) == data
    row = await traces.db.fetchrow(
        "select * from upload_pipeline.documents d join upload_pipeline.upload_jobs j using (document_id) "
        "where document_id = $1",
        accepted.document_id,
    )
    assert (row["filename"], row["file_bytes"], row["raw_key"]) == (f"note.{kind}", len(data), key)
    assert json.loads(row["metadata"]) == {"tags": ["a"]}
    assert (row["job_id"], row["stage"], row["state"]) == (accepted.job_id, "queued", "queued")
    assert (row["priority"], row["correlation_id"]) == (7, "c-1")
    assert not list(intake.scratch.iterdir())


async def test_the_same_bytes_again_are_the_first_document(intake, user, traces):
    data = make_document("txt", 2)
    first = await take(intake, user, data, "one.txt")
    second = await take(intake, user, data, "two.txt")
    assert second.duplicate
    assert (second.document_id, second.job_id) == (first.document_id, first.job_id)
    assert await traces.keys() == {raw_key(user, first.document_id)}
    assert await traces.jobs() == 1


async def test_the_same_bytes_of_another_user_are_another_document(intake, user, traces):
    data = make_document("txt", 2)
    mine = await take(intake, user, data, "one.txt")
    theirs = await take(intake, ids.LOCAL_USER_ID, data + user.bytes.hex().encode(), "one.txt")
    again = await take(intake, ids.LOCAL_USER_ID, data + user.bytes.hex().encode(), "one.txt")
    assert mine.document_id != theirs.document_id == again.document_id
    assert len(await traces.keys()) == 2


async def test_a_duplicate_whose_object_is_gone_brings_it_back(intake, user, traces):
    data = make_document("md", 3)
    first = await take(intake, user, data, "one.md")
    key = raw_key(user, first.document_id)
    await traces.store.delete([key])
    assert (await take(intake, user, data, "one.md")).duplicate
    assert await traces.store.get_bytes(key, len(data)) == data
    assert await traces.keys() == {key}


@pytest.mark.parametrize(
    ("data", "filename", "code", "named"),
    [
        (b"", "empty.txt", ErrorCode.EMPTY_FILE, "empty.txt"),
        (b"x" * 200_001, "large.txt", ErrorCode.FILE_TOO_LARGE, "200000"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "picture.png", ErrorCode.UNSUPPORTED_TYPE, "picture.png"),
        (b"just text", "named.pdf", ErrorCode.TYPE_MISMATCH, "named.pdf"),
        (b"%PDF-1.7\nno more than that", "broken.pdf", ErrorCode.CORRUPT_FILE, ""),
    ],
)
async def test_a_bad_file_is_refused_and_leaves_nothing(intake, user, traces, data, filename, code, named):
    with pytest.raises(PipelineError) as caught:
        await take(intake, user, data, filename)
    assert caught.value.code is code
    assert named in caught.value.message
    assert await traces.nothing()
    assert not intake.scratch.exists() or not list(intake.scratch.iterdir())


async def test_a_file_of_exactly_the_limit_is_taken(intake, user):
    assert await take(replace(intake, max_bytes=1000), user, b"y" * 1000, "a.txt")


async def test_bad_metadata_is_refused_before_a_byte_is_read(intake, user, traces):
    source = arriving(b"text")
    with pytest.raises(PipelineError) as caught:
        await accept_file(
            intake, chunks=source, filename="a.txt", user_id=user, metadata={"a": None}, correlation_id=""
        )
    assert caught.value.code is ErrorCode.INVALID_METADATA
    assert await anext(source) == b"text"
    assert await traces.nothing()


async def test_a_sender_that_breaks_off_leaves_nothing_and_its_error_comes_out(intake, user, traces):
    async def breaking_off() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionResetError("the browser went away")

    with pytest.raises(ConnectionResetError, match="the browser went away"):
        await accept_file(intake, chunks=breaking_off(), filename="a.txt", user_id=user, metadata={}, correlation_id="")
    assert await traces.nothing()


async def test_intakes_of_the_same_bytes_at_once_make_one_document(intake, user, traces):
    data = make_document("html", 4)
    accepted = await asyncio.gather(*(take(intake, user, data, f"{n}.html") for n in range(6)))
    assert len({one.document_id for one in accepted}) == 1
    assert sorted(one.duplicate for one in accepted) == [False] + [True] * 5
    assert await traces.keys() == {raw_key(user, accepted[0].document_id)}
    assert await traces.jobs() == 1
