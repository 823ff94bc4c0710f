"""What holds for objects on this machine's disk: how a store is opened, permissions, links, listings."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from local_objects import FUTURE, KEY, files

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.store import ObjectStore, open_store


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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
