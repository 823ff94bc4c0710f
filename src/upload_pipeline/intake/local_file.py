"""A file of this machine on its way in: opened once it is known to be a regular one, measured, read block by block."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import HEAD_BYTES
from upload_pipeline.storage.descriptors import GuardedDescriptor

BLOCK_BYTES = 512 * 1024

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True, slots=True)
class MeasuredFile:
    """A file as one reading found it: size in bytes, sha256 in hexadecimal, first bytes."""

    size: int
    sha256: str
    head: bytes


async def measure(path: Path, *, max_bytes: int) -> MeasuredFile:
    """Reads a file once, up to just beyond the limit; symbolic links are followed.

    Raises:
        PipelineError: `FILE_NOT_FOUND`, `FILE_UNREADABLE` or `FILE_TOO_LARGE`.
    """
    digest = hashlib.sha256()
    head = bytearray()
    size = 0
    async for block in read_blocks(path):
        size += len(block)
        # The limit holds for what is read, so that a file that grows without end ends here.
        if size > max_bytes:
            raise too_large(path.name, max_bytes)
        head += block[: HEAD_BYTES - len(head)]
        await asyncio.to_thread(digest.update, block)
    return MeasuredFile(size, digest.hexdigest(), bytes(head))


async def read_blocks(path: Path) -> AsyncGenerator[bytes, None]:
    """The file's bytes in blocks of at most `BLOCK_BYTES`.

    Raises:
        PipelineError: `FILE_NOT_FOUND` or `FILE_UNREADABLE`.
    """
    source = GuardedDescriptor(lambda: _open_regular(path))
    try:
        await asyncio.to_thread(source.open)
        while block := await asyncio.to_thread(source.read, BLOCK_BYTES):
            yield block
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from error
    finally:
        await asyncio.shield(asyncio.to_thread(source.close))


def too_large(filename: str, max_bytes: int) -> PipelineError:
    """The error of a file beyond the limit."""
    return PipelineError(
        ErrorCode.FILE_TOO_LARGE,
        f"{filename!r} is larger than the limit of {max_bytes} bytes. Send a smaller file, or raise "
        "UPLOAD_PIPELINE_MAX_FILE_BYTES.",
        {"filename": filename, "max_bytes": max_bytes},
    )


def changed(path: Path) -> PipelineError:
    """The error of a file that was written to while it was read."""
    return PipelineError(
        ErrorCode.FILE_CHANGED,
        f"{str(path)!r} changed while it was read. Send it again when nothing writes to it any more.",
        {"path": str(path)},
    )


def _open_regular(path: Path) -> int:
    # Looked at before it is opened, since opening a device can do something; looked at again after, since the name
    # can lead elsewhere by then. Without O_NONBLOCK a named pipe would wait for a writer.
    _require_regular(path, path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for matches, name in _KINDS if matches(mode)), "no regular file")
    remedy = "Name the files in it" if stat.S_ISDIR(mode) else "Name a regular file"
    raise PipelineError(
        ErrorCode.FILE_UNREADABLE, f"{str(path)!r} is {kind}. {remedy}.", {"path": str(path), "kind": kind}
    )


def _unreadable(path: Path, error: OSError | ValueError) -> PipelineError:
    details = {"path": str(path)}
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return PipelineError(ErrorCode.FILE_NOT_FOUND, f"There is no file {str(path)!r}. Check the path.", details)
    reason = error.strerror or type(error).__name__
    return PipelineError(
        ErrorCode.FILE_UNREADABLE,
        f"{str(path)!r} cannot be read: {reason}. Check its permissions and the disk that it is on.",
        details,
    )
