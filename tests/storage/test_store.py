"""What every store does, local or behind obstore."""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.store import ObjectStore, open_store

KEY = "raw/user/document"


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def keys(store: ObjectStore, prefix: str = "") -> set[str]:
    return {info.key async for info in store.list(prefix)}


def code(caught: pytest.ExceptionInfo[PipelineError]) -> ErrorCode:
    return caught.value.code


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b""],
        [b"x"],
        [b"a", b"", b"bc"],
        [b"y" * 524_288],
        [b"z" * 524_289, b"1"],
        [b"q" * 3_000_000],
        [b"r" * 10_000] * 200,
    ],
)
async def test_what_is_streamed_in_comes_out_with_its_measures(store, parts):
    data = b"".join(parts)
    stored = await store.put_stream(KEY, chunks(*parts), head_bytes=5)
    assert stored.key == KEY
    assert stored.size == len(data)
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    assert stored.head == data[:5]
    assert await store.get_bytes(KEY, len(data)) == data
    assert b"".join([chunk async for chunk in store.stream(KEY)]) == data


async def test_bytes_that_are_not_text_survive(store):
    data = bytes(range(256)) * 10
    await store.put_bytes(KEY, data)
    assert await store.get_bytes(KEY, 10_000) == data


async def test_streaming_out_keeps_to_the_chunk_size(store):
    await store.put_bytes(KEY, b"x" * 2500)
    assert [len(chunk) async for chunk in store.stream(KEY, 1000)] == [1000, 1000, 500]


async def test_a_second_put_replaces(store):
    await store.put_bytes(KEY, b"first, and longer")
    await store.put_bytes(KEY, b"second")
    assert await store.get_bytes(KEY, 100) == b"second"
    assert await keys(store) == {KEY}


async def test_a_stream_over_the_limit_is_cut_off_and_leaves_nothing(store):
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield b"x" * 100_000

    with pytest.raises(PipelineError) as caught:
        await store.put_stream(KEY, endless(), max_bytes=1_000_000)
    assert code(caught) is ErrorCode.FILE_TOO_LARGE
    assert "1000000 bytes" in caught.value.message
    assert caught.value.details["max_bytes"] == 1_000_000
    assert given == 11
    assert await keys(store) == set()


async def test_a_stream_of_just_the_limit_is_taken(store):
    assert (await store.put_stream(KEY, chunks(b"x" * 999, b"y"), max_bytes=1000)).size == 1000


async def test_a_put_that_fails_leaves_the_object_that_was_there(store):
    await store.put_bytes(KEY, b"old")
    with pytest.raises(PipelineError):
        await store.put_stream(KEY, chunks(b"n" * 2_000_000), max_bytes=1_999_999)
    assert await store.get_bytes(KEY, 10) == b"old"


@pytest.mark.parametrize("error", [RuntimeError("source broke"), FileNotFoundError(2, "gone"), TimeoutError("slow")])
async def test_what_the_source_raises_comes_out_unchanged_and_leaves_nothing(store, error):
    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * 6_000_000
        raise error

    with pytest.raises(type(error)) as caught:
        await store.put_stream(KEY, breaking())
    assert caught.value is error
    assert await keys(store) == set()


async def test_the_source_is_closed_when_the_put_ends_early(store):
    closed = False

    async def source() -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            while True:
                yield b"x" * 1000
        finally:
            closed = True

    with pytest.raises(PipelineError):
        await store.put_stream(KEY, source(), max_bytes=10)
    assert closed


async def test_a_cancelled_put_leaves_nothing(store):
    under_way = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield b"x" * 6_000_000
        under_way.set()
        await asyncio.Event().wait()

    put = asyncio.create_task(store.put_stream(KEY, stuck()))
    await under_way.wait()
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert await keys(store) == set()


async def test_a_sender_that_gives_nothing_is_given_up(root):
    for store in (
        open_store(f"file://{root}", progress_seconds=0.1),
        ObjectStore(ObstoreBackend(MemoryStore()), 0.1),
    ):

        async def silent() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.Event().wait()

        with pytest.raises(PipelineError) as caught:
            await store.put_stream(KEY, silent())
        assert code(caught) is ErrorCode.STORAGE_UNAVAILABLE
        assert "sender" in caught.value.message
        assert await keys(store) == set()


async def test_a_slow_sender_that_goes_on_is_not_given_up(root):
    store = open_store(f"file://{root}", progress_seconds=0.5)

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(8):
            await asyncio.sleep(0.1)
            yield b"x"

    assert (await store.put_stream(KEY, slow())).size == 8


async def test_two_writers_of_one_key_leave_one_whole_object(store):
    bodies = [bytes([65 + number]) * 1_500_000 for number in range(6)]

    async def interleaved(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            await asyncio.sleep(0)
            yield body[start : start + 100_000]

    await asyncio.gather(*(store.put_stream(KEY, interleaved(body)) for body in bodies))
    assert await store.get_bytes(KEY, 2_000_000) in bodies
    assert await keys(store) == {KEY}


async def test_a_missing_object_is_named(store, tmp_path):
    target = tmp_path / "copy"
    for reading in (
        store.get_bytes(KEY, 10),
        store.get_text(KEY, 10),
        store.download(KEY, target),
        anext(store.stream(KEY)),
        store.move(KEY, "raw/other"),
        store.move(KEY, KEY),
    ):
        with pytest.raises(PipelineError) as caught:
            await reading
        assert code(caught) is ErrorCode.OBJECT_MISSING
        assert KEY in caught.value.message
    assert await store.head(KEY) is None
    assert not target.exists()


async def test_reading_more_than_allowed_is_refused(store):
    await store.put_bytes(KEY, b"12345")
    assert await store.get_bytes(KEY, 5) == b"12345"
    with pytest.raises(PipelineError) as caught:
        await store.get_bytes(KEY, 4)
    assert code(caught) is ErrorCode.FILE_TOO_LARGE


async def test_text_is_utf8_with_its_line_ends(store):
    await store.put_bytes(KEY, "é\r\nש\n".encode())
    assert await store.get_text(KEY, 100) == "é\r\nש\n"
    await store.put_bytes(KEY, b"ab\xff")
    with pytest.raises(PipelineError) as caught:
        await store.get_text(KEY, 100)
    assert code(caught) is ErrorCode.CORRUPT_FILE
    assert caught.value.details["offset"] == 2


@pytest.mark.parametrize("size", [0, 1, 1_500_000])
async def test_a_download_is_the_object_and_overwrites(store, tmp_path, size):
    data = b"d" * size
    await store.put_bytes(KEY, data)
    target = tmp_path / "copy"
    target.write_bytes(b"something older and longer" * 100_000)
    copied = await store.download(KEY, target)
    assert target.read_bytes() == data
    assert (copied.size, copied.sha256) == (size, hashlib.sha256(data).hexdigest())


async def test_a_download_to_a_place_that_is_not_there_is_named(store, tmp_path):
    await store.put_bytes(KEY, b"x")
    with pytest.raises(PipelineError) as caught:
        await store.download(KEY, tmp_path / "no" / "such" / "folder")
    assert code(caught) is ErrorCode.STORAGE_UNAVAILABLE
    assert str(tmp_path) in caught.value.message


async def test_a_file_is_put_by_path(store, tmp_path):
    source = tmp_path / "file"
    source.write_bytes(b"f" * 700_000)
    stored = await store.put_file(KEY, source)
    assert stored.size == 700_000
    assert await store.get_bytes(KEY, 700_000) == source.read_bytes()
    with pytest.raises(PipelineError):
        await store.put_file("raw/other", source, max_bytes=10)
    with pytest.raises(FileNotFoundError):
        await store.put_file("raw/other", tmp_path / "none")
    assert await keys(store) == {KEY}


async def test_head_tells_size_and_time(store):
    before = datetime.now(UTC) - timedelta(seconds=2)
    await store.put_bytes(KEY, b"123")
    info = await store.head(KEY)
    assert info is not None
    assert (info.key, info.size) == (KEY, 3)
    assert before < info.modified_at < datetime.now(UTC) + timedelta(seconds=2)
    assert await store.head("raw/user") is None


async def test_a_move_replaces_the_target_and_ends_the_source(store):
    await store.put_bytes("incoming/a", b"new")
    await store.put_bytes(KEY, b"old")
    await store.move("incoming/a", KEY)
    assert await store.get_bytes(KEY, 10) == b"new"
    assert await keys(store) == {KEY}
    with pytest.raises(PipelineError) as caught:
        await store.move("incoming/a", KEY)
    assert code(caught) is ErrorCode.OBJECT_MISSING
    assert await store.get_bytes(KEY, 10) == b"new"


async def test_a_move_onto_itself_keeps_the_object(store):
    await store.put_bytes(KEY, b"only copy")
    await store.move(KEY, KEY)
    assert await store.get_bytes(KEY, 10) == b"only copy"


async def test_delete_takes_missing_keys_and_repeats(store):
    await asyncio.gather(*(store.put_bytes(f"raw/u/{number}", b"x") for number in range(5)))
    for _ in range(2):
        await store.delete(["raw/none", "raw/u/0", "nowhere/at/all", "raw/u/1", "raw/u/2"])
        assert await keys(store) == {"raw/u/3", "raw/u/4"}
    await store.delete([])
    assert await keys(store) == {"raw/u/3", "raw/u/4"}


async def test_delete_of_a_prefix_removes_no_object(local):
    await local.put_bytes(KEY, b"x")
    await local.delete(["raw/user", "raw"])
    assert await keys(local) == {KEY}


async def test_delete_removes_more_than_a_batch(store):
    names = [f"raw/u/{number}" for number in range(230)]
    await asyncio.gather(*(store.put_bytes(name, b"") for name in names))
    await store.delete(names)
    assert await keys(store) == set()


async def test_delete_goes_on_after_missing_keys(store):
    names = [f"raw/u/{number}" for number in range(40)]
    await asyncio.gather(*(store.put_bytes(name, b"") for name in names))
    await store.delete(["raw/none", *names])
    assert await keys(store) == set()


async def test_delete_removes_nothing_when_one_key_is_bad(store):
    await store.put_bytes(KEY, b"x")
    with pytest.raises(PipelineError) as caught:
        await store.delete([KEY, "../x"])
    assert code(caught) is ErrorCode.INVALID_KEY
    assert await keys(store) == {KEY}


async def test_a_listing_goes_by_whole_parts(store):
    for key in ("raw/a/1", "raw/a/2", "raw/ab/3", "parsed/a/1.md", "raw/c"):
        await store.put_bytes(key, b"x" * len(key))
    assert await keys(store) == {"raw/a/1", "raw/a/2", "raw/ab/3", "parsed/a/1.md", "raw/c"}
    assert await keys(store, "raw/a") == {"raw/a/1", "raw/a/2"}
    assert await keys(store, "nothing/here") == set()
    assert await keys(store, "raw/c") == set()
    assert {info.size async for info in store.list("raw/ab")} == {8}


async def test_a_listing_of_more_than_a_batch_is_whole(store):
    names = {f"raw/{number % 7}/{number}" for number in range(1203)}
    for start in range(0, 1203, 100):
        batch = sorted(names)[start : start + 100]
        await asyncio.gather(*(store.put_bytes(name, b"") for name in batch))
    listed = [info.key async for info in store.list("raw")]
    assert len(listed) == len(names)
    assert set(listed) == names


@pytest.mark.parametrize("key", ["", "../x", "/etc/passwd", "raw//x", "raw/é", "raw/\0", "a\\b", "x" * 1025])
async def test_every_method_refuses_a_bad_key(store, tmp_path, key):
    for call in (
        store.put_stream(key, chunks(b"x")),
        store.put_bytes(key, b"x"),
        store.get_bytes(key, 1),
        store.get_text(key, 1),
        store.download(key, tmp_path / "copy"),
        anext(store.stream(key)),
        store.head(key),
        store.move(key, KEY),
        store.move(KEY, key),
        store.delete([key]),
        anext(store.list(key or "..")),
    ):
        with pytest.raises(PipelineError) as caught:
            await call
        assert code(caught) is ErrorCode.INVALID_KEY


async def test_check_writable_leaves_nothing(store):
    await store.check_writable()
    await store.check_writable()
    assert await keys(store) == set()


async def test_sixty_four_megabytes_pass_in_less_than_eight(local: ObjectStore, tmp_path: Path):
    async def source() -> AsyncIterator[bytes]:
        for number in range(1024):
            yield bytes([number % 256]) * 65_536

    tracemalloc.start()
    try:
        stored = await local.put_stream(KEY, source())
        copied = await local.download(KEY, tmp_path / "copy")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert stored.size == copied.size == 64 * 1024 * 1024
    assert stored.sha256 == copied.sha256
    assert peak < 8 * 1024 * 1024
