"""Disks that are nearly full, or fill in the middle: real small file systems, mounted for the test."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file, accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.storage.store import open_store

MIB = 1024 * 1024
Mount = Callable[[str, int], Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """Mounts file systems of so many MiB; they go with the test."""
    mounts: list[Path] = []

    def mount(name: str, size: int) -> Path:
        where = tmp_path / name
        where.mkdir()
        command = ["/bin/mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(where)]
        try:
            made = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("a small file system cannot be mounted here: there is no mount command")
        if made.returncode != 0:
            pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")
        mounts.append(where)
        return where

    yield mount
    for where in mounts:
        subprocess.run(["/bin/umount", str(where)], check=True)


def on(intake: Intake, *, store: Path | None = None, scratch: Path | None = None, floor: int = 0) -> Intake:
    return replace(
        intake,
        store=open_store(f"file://{store / 'objects'}") if store else intake.store,
        scratch=scratch / "scratch" if scratch else intake.scratch,
        max_bytes=64 * MIB,
        min_free_bytes=floor,
    )


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def text(size: int, *, asked: list[int] | None = None) -> AsyncIterator[bytes]:
    line = b"A line of a text that is long enough to be a document.\n"
    block = line * (65536 // len(line))
    for sent in range(0, size, len(block)):
        if asked is not None:
            asked.append(sent)
        yield block


async def take(intake: Intake, user: UUID, chunks: AsyncIterator[bytes]) -> Any:
    return await accept_file(
        intake, chunks=chunks, filename="note.txt", user_id=user, metadata={}, correlation_id="room"
    )


async def refused(intake: Intake, user: UUID, chunks: AsyncIterator[bytes]) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        await take(intake, user, chunks)
    assert caught.value.code is ErrorCode.INSUFFICIENT_STORAGE
    assert caught.value.retryable
    assert "Free space" in caught.value.message
    return caught.value


async def test_below_the_floor_no_byte_is_asked_for_and_above_it_the_same_file_is_taken(
    intake: Intake, user: UUID, mounted: Mount
) -> None:
    disk = mounted("disk", 8)
    tight = on(intake, store=disk, floor=16 * MIB)
    asked: list[int] = []
    error = await refused(tight, user, text(MIB, asked=asked))
    assert asked == []
    assert str(16 * MIB) in error.message
    assert files(disk) == []
    accepted = await take(replace(tight, min_free_bytes=MIB), user, text(MIB))
    assert not accepted.duplicate


async def test_a_disk_that_fills_in_the_middle_keeps_nothing_and_takes_the_next_file(
    intake: Intake, user: UUID, mounted: Mount, db: Any
) -> None:
    disk = mounted("disk", 6)
    small = on(intake, store=disk)
    await refused(small, user, text(12 * MIB))
    assert files(disk) == []
    assert await db.fetchval("select count(*) from upload_pipeline.documents where user_id = $1", user) == 0
    # again: neither the first failure nor this one has eaten space
    await refused(small, user, text(12 * MIB))
    accepted = await take(small, user, text(3 * MIB))
    assert len(files(disk)) == 1
    assert not accepted.duplicate


async def test_a_disk_of_temporary_files_that_is_full_refuses_and_leaves_no_object(
    intake: Intake, user: UUID, mounted: Mount, tmp_path: Path
) -> None:
    disk = mounted("scratch-disk", 2)
    tight = on(intake, scratch=disk)
    await refused(tight, user, text(5 * MIB))
    assert files(disk) == []
    assert files(tmp_path / "objects") == []


async def test_a_local_file_that_would_not_leave_the_floor_is_not_begun(
    intake: Intake, user: UUID, mounted: Mount, tmp_path: Path
) -> None:
    disk = mounted("disk", 8)
    source = tmp_path / "note.txt"
    source.write_bytes(b"A line of text.\n" * (3 * MIB // 16))
    tight = on(intake, store=disk, floor=6 * MIB)

    async def take_path(intake: Intake) -> Any:
        return await accept_path(intake, path=source, user_id=user, metadata={}, correlation_id="room")

    with pytest.raises(PipelineError) as caught:
        await take_path(tight)
    assert caught.value.code is ErrorCode.INSUFFICIENT_STORAGE
    assert str(source.stat().st_size) in caught.value.message
    assert files(disk) == []
    assert not (await take_path(replace(tight, min_free_bytes=4 * MIB))).duplicate
