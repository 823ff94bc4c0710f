"""What holds for objects on this machine's disk: durability, crashes, permissions, links."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.store import ObjectStore, open_store

KEY = "raw/user/document"
NOBODY = 65534
FUTURE = datetime.now(UTC) + timedelta(days=1)


async def blocks(count: int, size: int = 524_288) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) * size


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# opening


@pytest.mark.parametrize(
    "url",
    [
        "",
        "storage",
        "/abs/path",
        "file:",
        "file://",
        "file:///",
        "file://relative/x",
        "ftp://bucket",
        "FILE:///x",
        "file:///a\0b",
    ],
)
def test_a_url_that_names_no_store_is_refused_with_what_is_allowed(url):
    with pytest.raises(PipelineError) as caught:
        open_store(url)
    assert caught.value.code is ErrorCode.SETTING_INVALID
    for part in ("UPLOAD_PIPELINE_STORAGE_URL", repr(url), "file:///"):
        assert part in caught.value.message


async def test_the_directory_and_all_in_it_are_for_the_owner_only(tmp_path):
    old = os.umask(0)
    try:
        root = tmp_path / "new" / "store with space%20"
        store = open_store(f"file://{root}")
        await store.put_bytes(KEY, b"x")
    finally:
        os.umask(old)
    assert [mode(root.parent), mode(root), mode(root / "raw" / "user")] == [0o700] * 3
    assert mode(root / KEY) == 0o600


async def test_opening_again_finds_what_is_there_and_leaves_its_permissions(tmp_path):
    root = tmp_path / "objects"
    root.mkdir(mode=0o750)
    await open_store(f"file://{root}").put_bytes(KEY, b"kept")
    again = open_store(f"file://{root}")
    assert await again.get_bytes(KEY, 10) == b"kept"
    assert mode(root) == 0o750


def test_a_file_in_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PipelineError) as caught:
            open_store(f"file://{root}")
        assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
        assert str(root) in caught.value.message


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


# failures of the disk


def test_a_full_disk_is_named_and_the_store_recovers(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")

    async def fill() -> None:
        store = open_store(f"file://{mount}/objects")
        await store.put_bytes(KEY, b"old")
        with pytest.raises(PipelineError) as caught:
            await store.put_stream(KEY, blocks(16))
        assert caught.value.code is ErrorCode.INSUFFICIENT_STORAGE
        assert caught.value.retryable
        assert "full" in caught.value.message
        assert "UPLOAD_PIPELINE_STORAGE_URL" in caught.value.message
        assert files(mount) == [f"objects/{KEY}"]
        assert await store.get_bytes(KEY, 10) == b"old"
        await store.put_stream(KEY, blocks(2))
        assert (await store.head(KEY)).size == 2 * 524_288

    try:
        asyncio.run(fill())
    finally:
        subprocess.run(["/bin/umount", mount], check=True)


async def test_a_store_that_went_away_is_not_an_empty_one(local, root):
    root.rmdir()
    for call in (
        local.head(KEY),
        local.get_bytes(KEY, 1),
        anext(local.list()),
        local.delete([KEY]),
        local.put_bytes(KEY, b"x"),
        local.move(KEY, "raw/x"),
        local.check_writable(),
        local.remove_unfinished(FUTURE),
    ):
        with pytest.raises(PipelineError) as caught:
            await call
        assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert not root.exists()


UNPRIVILEGED = """
import asyncio, sys
from upload_pipeline.errors import PipelineError
from upload_pipeline.storage.store import open_store
import os
url = sys.argv[1]

async def attempt(name, call):
    try:
        await call
    except PipelineError as error:
        print(name, error.code, "UPLOAD_PIPELINE_STORAGE_URL" in error.message)
    else:
        print(name, "done")

async def run():
    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    store = open_store(url)
    await attempt("check", store.check_writable())
    await attempt("read", store.get_bytes("raw/user/document", 10))
    try:
        open_store(url + "/deeper")
    except PipelineError as error:
        print("open", error.code)

asyncio.run(run())
"""


async def test_missing_permission_is_named(tmp_path):
    outer = Path("/tmp") / f"denied-{os.getpid()}"  # pytest's own folder cannot be entered by other users
    root = outer / "objects"
    try:
        store = open_store(f"file://{root}")
        await store.put_bytes(KEY, b"x")
        outer.chmod(0o755)
        root.chmod(0o555)
        (root / "raw").chmod(0o000)
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", UNPRIVILEGED, f"file://{root}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if "ModuleNotFoundError" in ran.stderr or "Permission denied" in ran.stderr.split("\n", 1)[0]:
            pytest.skip("another user cannot run this interpreter")
        assert ran.stdout.splitlines() == [
            "check STORAGE_DENIED True",
            "read STORAGE_DENIED True",
            "open STORAGE_DENIED",
        ], ran.stderr
    finally:
        for path in (root, root / "raw"):
            path.chmod(0o700)
        shutil.rmtree(outer)


async def test_a_disk_that_does_not_answer_is_given_up(root):
    store = open_store(f"file://{root}", progress_seconds=0.2)
    await store.put_bytes(KEY, b"x")
    answer = threading.Event()
    busy = [store.backend.executor.submit(answer.wait) for _ in range(8)]  # each thread hangs in the disk
    try:
        for call in (store.head(KEY), store.get_bytes(KEY, 1), store.delete([KEY]), anext(store.list())):
            with pytest.raises(PipelineError) as caught:
                await call
            assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
            assert "0.2 s" in caught.value.message
    finally:
        answer.set()
    assert all(future.result() for future in busy)
    assert await store.get_bytes(KEY, 1) == b"x"


async def test_a_key_below_another_objects_key_is_refused(local):
    await local.put_bytes("raw/a", b"x")
    with pytest.raises(PipelineError) as caught:
        await local.put_bytes("raw/a/b", b"y")
    assert caught.value.code is ErrorCode.INVALID_KEY
    await local.put_bytes("raw/c/d", b"x")
    with pytest.raises(PipelineError) as caught:
        await local.put_bytes("raw/c", b"y")
    assert caught.value.code is ErrorCode.INVALID_KEY
    assert await local.head("raw/a/b") is None
    assert {info.key async for info in local.list()} == {"raw/a", "raw/c/d"}


# links


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    place = tmp_path / "outside"
    (place / "user").mkdir(parents=True)
    (place / "user" / "document").write_bytes(b"secret")
    return place


async def test_a_linked_directory_leads_nowhere(local: ObjectStore, root, outside):
    (root / "raw").symlink_to(outside)
    for call in (
        local.head(KEY),
        local.get_bytes(KEY, 10),
        local.put_bytes(KEY, b"overwritten"),
        local.put_bytes("raw/new", b"planted"),
        local.delete([KEY]),
        local.move(KEY, "parsed/x"),
    ):
        with pytest.raises(PipelineError) as caught:
            await call
        assert caught.value.code is ErrorCode.STORAGE_DENIED
        assert "symbolic link" in caught.value.message
    await local.put_bytes("parsed/x", b"x")
    with pytest.raises(PipelineError):
        await local.move("parsed/x", KEY)
    assert [info.key async for info in local.list()] == ["parsed/x"]
    assert files(outside) == ["user/document"]
    assert (outside / "user" / "document").read_bytes() == b"secret"
    assert [name for name in files(root) if name.startswith(".")] == []


async def test_a_linked_object_is_not_read_and_only_the_link_is_replaced_or_removed(local, root, outside):
    secret = outside / "user" / "document"
    (root / "raw").mkdir()
    link = root / "raw" / "link"
    link.symlink_to(secret)
    for call in (local.get_bytes("raw/link", 10), local.head("raw/link"), local.move("raw/link", "raw/x")):
        with pytest.raises(PipelineError) as caught:
            await call
        assert caught.value.code is ErrorCode.STORAGE_DENIED
    assert [info.key async for info in local.list()] == []
    await local.put_bytes("raw/link", b"mine")
    assert not link.is_symlink()
    link.unlink()
    link.symlink_to(secret)
    await local.delete(["raw/link"])
    assert not link.is_symlink()
    assert secret.read_bytes() == b"secret"


async def test_a_linked_directory_of_unfinished_writes_is_refused(local, root, outside):
    (root / ".unfinished").symlink_to(outside)
    for call in (local.put_bytes(KEY, b"x"), local.remove_unfinished(FUTURE)):
        with pytest.raises(PipelineError) as caught:
            await call
        assert caught.value.code is ErrorCode.STORAGE_DENIED
    assert files(outside) == ["user/document"]


async def test_the_root_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "objects").symlink_to(tmp_path / "disk")
    store = open_store(f"file://{tmp_path}/objects")
    await store.put_bytes(KEY, b"x")
    assert files(tmp_path / "disk") == [KEY]


async def test_a_loop_of_links_and_foreign_files_do_not_disturb_a_listing(local, root):
    await local.put_bytes(KEY, b"x")
    (root / "raw" / "loop").symlink_to(root)
    (root / "raw" / ".DS_Store").write_bytes(b"x")
    (root / "raw" / "with space").write_bytes(b"x")
    os.mkfifo(root / "raw" / "pipe")
    assert [info.key async for info in local.list()] == [KEY]
    with pytest.raises(PipelineError) as caught:
        await local.get_bytes("raw/pipe", 10)
    assert caught.value.code is ErrorCode.OBJECT_MISSING
    assert await local.head("raw/pipe") is None


async def test_a_listing_is_read_as_it_is_asked_for(local, root):
    for number in range(20):
        folder = root / "raw" / str(number)
        folder.mkdir(parents=True)
        for name in range(100):
            (folder / str(name)).touch()
    listing = local.list("raw")
    seen = [(await anext(listing)).key]
    shutil.rmtree(root / "raw")
    seen += [info.key async for info in listing]
    assert len(seen) <= 600  # one batch, and what is left of the directory that it ended in
