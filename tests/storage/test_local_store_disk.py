"""A disk that is full, gone, closed to us or does not answer, and what the store says of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from local_objects import FUTURE, KEY, blocks, files

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.store import open_store


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
