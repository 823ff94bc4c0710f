"""All of an object is on the disk or nothing: what is synced, and writers that break, are cancelled or killed."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from local_objects import FUTURE, KEY, blocks, files

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.store import ObjectStore, open_store


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# durability


async def test_file_and_every_directory_are_synced_around_the_rename(local, root, monkeypatch):
    calls: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append("file" if path.is_file() else str(path.relative_to(root)))
        real_sync(descriptor)

    def rename(source, target, **places):
        calls.append("rename")
        real_rename(source, target, **places)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    await local.put_bytes(KEY, b"x")
    assert calls == ["file", "rename", "raw/user", "raw", "."]
    calls.clear()
    await local.move(KEY, "parsed/x")
    assert calls == ["rename", "parsed", ".", "raw/user", "raw", "."]


async def test_the_directory_of_a_document_goes_with_its_last_object_and_others_stay(local, root):
    texts = [f"parsed/user/document/{name}.md" for name in ("a", "b")]
    for key in (*texts, KEY, "incoming/x"):
        await local.put_bytes(key, b"x")
    await local.delete([texts[0]])
    assert files(root / "parsed") == ["user/document/b.md"]
    await local.delete([texts[1], KEY, "incoming/x", texts[0]])
    kept = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.name.startswith("."))
    assert kept == ["incoming", "parsed", "parsed/user", "raw", "raw/user"]
    await local.put_bytes(texts[0], b"again")
    assert await local.get_bytes(texts[0], 10) == b"again"


async def test_an_object_is_stored_while_its_directory_is_taken_away(root):
    stores = [open_store(f"file://{root}") for _ in range(2)]

    async def write(store: ObjectStore, name: str) -> None:
        for number in range(150):
            key = f"parsed/user/document/{name}.md"
            await store.put_bytes(key, str(number).encode())
            assert await store.get_bytes(key, 10) == str(number).encode()
            await store.delete([key])

    await asyncio.gather(*(write(store, f"{place}{n}") for place, store in enumerate(stores) for n in range(3)))
    assert files(root) == []


async def test_nothing_stands_under_the_key_before_the_last_byte(local, root):
    seen: list[object] = []

    async def watched() -> AsyncIterator[bytes]:
        async for block in blocks(6):
            seen.append(await local.head(KEY))
            yield block

    await local.put_stream(KEY, watched())
    assert seen == [None] * 6
    assert files(root) == [KEY]


# crashes


async def test_a_source_that_breaks_leaves_no_file_at_all(local, root):
    async def breaking() -> AsyncIterator[bytes]:
        async for block in blocks(3):
            yield block
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        await local.put_stream(KEY, breaking())
    assert files(root) == []


async def test_a_put_cancelled_at_any_moment_leaves_all_or_nothing_and_no_descriptor(local, root):
    await local.put_bytes("raw/warm", b"")  # the pool's threads are there before we count
    before = open_descriptors()
    outcomes = set()
    for step in range(2000):
        put = asyncio.create_task(local.put_stream(KEY, blocks(4)))
        await asyncio.sleep(step * 0.0002)
        put.cancel()
        try:
            await put
        except asyncio.CancelledError:
            outcomes.add("cancelled")
        info = await local.head(KEY)
        if info is not None:
            outcomes.add("whole")
            assert info.size == 4 * 524_288
        await local.delete([KEY])
        assert files(root) == ["raw/warm"]
        if "whole" in outcomes and step >= 60:
            break
    assert outcomes == {"cancelled", "whole"}
    local.backend.executor.shutdown()  # every late close has had its turn
    assert open_descriptors() <= before


async def test_a_stream_out_that_is_dropped_or_cancelled_leaves_no_descriptor(local):
    await local.put_stream(KEY, blocks(8))
    before = open_descriptors()
    for step in range(20):
        reader = local.stream(KEY, 10_000)
        await anext(reader)
        await reader.aclose()

        async def read_all() -> None:
            async for _ in local.stream(KEY, 10_000):
                pass

        task = asyncio.create_task(read_all())
        await asyncio.sleep(step * 0.0002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    local.backend.executor.shutdown()
    assert open_descriptors() <= before


async def test_a_download_that_breaks_leaves_no_file(local, root, tmp_path):
    await local.put_stream(KEY, blocks(40))
    target = tmp_path / "copy"
    task = asyncio.create_task(local.download(KEY, target))
    while not target.exists():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not target.exists()


KILLED_WRITER = """
import asyncio, sys
from upload_pipeline.storage.store import open_store

async def endless():
    while True:
        yield b"x" * 524288
        print("wrote", flush=True)
        await asyncio.sleep(0.01)

asyncio.run(open_store(sys.argv[1]).put_stream("raw/user/document", endless()))
"""


async def test_a_writer_killed_midway_leaves_one_unfinished_file_that_the_sweep_removes(local, root):
    await local.put_bytes(KEY, b"old")
    writer = subprocess.Popen(  # noqa: ASYNC220 - the test waits for it anyway
        [sys.executable, "-c", KILLED_WRITER, f"file://{root}"], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    for _ in range(3):
        assert writer.stdout.readline() == b"wrote\n"
    writer.send_signal(signal.SIGKILL)
    writer.stdout.close()
    assert writer.wait(10) == -signal.SIGKILL

    left = [name for name in files(root) if name != KEY]
    assert len(left) == 1
    assert left[0].startswith(".unfinished/")
    assert (root / left[0]).stat().st_size >= 524_288
    assert await local.get_bytes(KEY, 10) == b"old"
    assert [info.key async for info in local.list()] == [KEY]

    assert await local.remove_unfinished(datetime.now(UTC) - timedelta(hours=1)) == 0
    assert await local.remove_unfinished(FUTURE) == 1
    assert await local.remove_unfinished(FUTURE) == 0
    assert files(root) == [KEY]


async def test_a_write_whose_unfinished_file_was_swept_fails_and_leaves_nothing(local, root):
    async def swept() -> AsyncIterator[bytes]:
        async for block in blocks(4):
            yield block
        assert await local.remove_unfinished(FUTURE) == 1

    with pytest.raises(PipelineError) as caught:
        await local.put_stream(KEY, swept())
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert files(root) == []
