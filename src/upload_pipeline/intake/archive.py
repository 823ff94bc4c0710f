"""A batch that comes as a ZIP: received into a temporary file, then its files read one after the other.

What an archive says of itself is not believed: entries, expanded bytes and the ratio are counted while it is read, and
where they pass a limit the whole batch is refused. An entry's path is never used; its base name is the file's name.
"""

from __future__ import annotations

import asyncio
import stat
import struct
import zipfile
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.batch_files import MAX_FILES, BatchFiles, too_many_files
from upload_pipeline.intake.filenames import display_name
from upload_pipeline.intake.staging import Intake
from upload_pipeline.storage.free_space import require_free

BLOCK_BYTES = 256 * 1024

RATIO_FROM_BYTES = 1024 * 1024
"""A file that expands to less is not held to the ratio: a few lines of one character are no bomb."""

_ENTRY_BYTES = 512
"""Of the central directory, for each entry that is allowed: 46 and the name."""
_END = struct.Struct("<4s4H2LH")
_END_MARK, _END64_MARK = b"PK\x05\x06", b"PK\x06\x07"
_MAX_COMMENT = 0xFFFF
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, RuntimeError, struct.error)
"""What `zipfile` raises of bytes that are no archive, or not the one that they say."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """Limits of an archive.

    Attributes:
        max_bytes: of the archive, and of all its files together once expanded.
        max_entries: folders and hidden files counted.
        max_ratio: how many times as large as in the archive a file may become.
    """

    max_bytes: int
    max_entries: int
    max_ratio: float


async def receive_archive(intake: Intake, chunks: AsyncIterator[bytes], path: Path, limits: ArchiveLimits) -> None:
    """Writes an archive to a file of this machine as it comes.

    Raises:
        PipelineError: `INVALID_ARCHIVE` where it is larger than allowed; `INSUFFICIENT_STORAGE`; what `chunks` raises.
    """
    size = 0
    with path.open("xb") as file:
        async for chunk in chunks:
            size += len(chunk)
            if size > limits.max_bytes:
                raise invalid_archive(f"it is larger than {limits.max_bytes} bytes")
            await asyncio.to_thread(require_free, path.parent, floor=intake.min_free_bytes, expected=len(chunk))
            await asyncio.to_thread(file.write, chunk)


async def add_archive(
    files: BatchFiles, path: Path, limits: ArchiveLimits, *, before_file: Callable[[], Awaitable[None]] | None = None
) -> list[str]:
    """Adds the files of an archive to a batch.

    Left out, with a warning: hidden files and what systems add (`__MACOSX`). Failed members: encrypted entries, links,
    and entries that are damaged or compressed in another way than by deflate.

    Args:
        files: of the batch.
        path: of the archive.
        limits: of the archive.
        before_file: asked before each file; what it raises refuses the batch.

    Returns:
        The warnings.

    Raises:
        PipelineError: `INVALID_ARCHIVE` where it is no ZIP, cut short, without files, or beyond a limit;
            `BATCH_TOO_LARGE`; and as `BatchFiles.add_stream` does.
    """
    await asyncio.to_thread(_check_directory, path, limits)
    with path.open("rb") as file:
        archive = await asyncio.to_thread(_open, file)
        entries, warnings = _files(archive, limits)
        if not entries:
            raise invalid_archive("there are no files in it")
        if len(entries) > MAX_FILES:
            raise too_many_files(len(entries))
        expanding = _Expanding(archive, limits)
        for entry in entries:
            if before_file is not None:
                await before_file()
            name = display_name(entry.filename)
            refusal = _refusal(entry, name)
            if refusal is not None:
                await files.add_refused(name, refusal)
            else:
                await files.add_stream(name, expanding.chunks(entry, name), file_faults={ErrorCode.CORRUPT_FILE})
    return warnings


def invalid_archive(reason: str) -> PipelineError:
    """The error of an archive that is not taken as a whole."""
    return PipelineError(ErrorCode.INVALID_ARCHIVE, f"The archive is not taken: {reason}.", {"reason": reason})


def _open(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _BROKEN as error:
        raise invalid_archive(f"it is damaged ({error})") from error


def _check_directory(path: Path, limits: ArchiveLimits) -> None:
    """Looks at the end of the archive, so that no directory is read whose size alone is an attack.

    Raises:
        PipelineError: `INVALID_ARCHIVE`.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        begin = max(0, size - _END.size - _MAX_COMMENT)
        file.seek(max(0, begin - 20))
        tail = file.read()
    at = tail.rfind(_END_MARK)
    if at < 0 or at + _END.size > len(tail):
        raise invalid_archive("it is no ZIP, or it is cut short")
    _, _, _, _, entries, directory_bytes, offset, _ = _END.unpack_from(tail, at)
    if _END64_MARK in tail[max(0, at - 20) : at] or entries == 0xFFFF or 0xFFFFFFFF in (directory_bytes, offset):
        raise invalid_archive("it is a ZIP64, as only archives of 4 GB or 65,535 files need to be")
    if entries > limits.max_entries or directory_bytes > limits.max_entries * _ENTRY_BYTES:
        raise invalid_archive(f"it has more than {limits.max_entries} entries")


def _files(archive: zipfile.ZipFile, limits: ArchiveLimits) -> tuple[list[zipfile.ZipInfo], list[str]]:
    entries = archive.infolist()
    if len(entries) > limits.max_entries:  # of the number that it states nothing is believed
        raise invalid_archive(f"it has more than {limits.max_entries} entries")
    if any(entry.header_offset < 0 for entry in entries):
        raise invalid_archive("it is damaged (its beginning is missing)")
    # and not is_dir(), which wants a name that has a last character
    files = [entry for entry in entries if not entry.filename.endswith("/")]
    hidden = [entry for entry in files if _is_hidden(entry.filename)]
    warnings = []
    if hidden:
        shown = ", ".join(f'"{display_name(entry.filename)}"' for entry in hidden[:5])
        more = f" and {len(hidden) - 5} more" if len(hidden) > 5 else ""
        warnings.append(f"hidden files of the archive were left out: {shown}{more}")
    return [entry for entry in files if not _is_hidden(entry.filename)], warnings


def _is_hidden(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return parts[0] == "__MACOSX" or parts[-1].startswith(".")


def _refusal(entry: zipfile.ZipInfo, name: str) -> PipelineError | None:
    """Why an entry is not even read, or None."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        what = "a symbolic link" if kind == stat.S_IFLNK else "no regular file"
        return PipelineError(
            ErrorCode.UNSUPPORTED_TYPE, f"{name!r} is {what} in the archive. Put the file itself into it."
        )
    if entry.flag_bits & 0x1:
        return PipelineError(
            ErrorCode.ENCRYPTED, f"{name!r} is encrypted in the archive. Make the archive without a password."
        )
    if entry.compress_type not in _METHODS:
        return PipelineError(
            ErrorCode.UNSUPPORTED_TYPE,
            f"{name!r} is compressed in an unusual way ({entry.compress_type}) in the archive. Make it with deflate.",
        )
    return None


class _Expanding:
    """The files of an archive as they expand, each held to the ratio and all together to the total."""

    def __init__(self, archive: zipfile.ZipFile, limits: ArchiveLimits) -> None:
        self._archive = archive
        self._limits = limits
        self._total = 0

    async def chunks(self, entry: zipfile.ZipInfo, name: str) -> AsyncGenerator[bytes]:
        """An entry's bytes.

        Raises:
            PipelineError: `CORRUPT_FILE` where the entry is damaged; `INVALID_ARCHIVE` beyond a limit.
        """
        try:
            with await asyncio.to_thread(self._archive.open, entry) as stream:
                size = 0
                while block := await asyncio.to_thread(stream.read, BLOCK_BYTES):
                    size += len(block)
                    self._total += len(block)
                    if size > max(RATIO_FROM_BYTES, entry.compress_size * self._limits.max_ratio):
                        raise invalid_archive(
                            f"{name!r} expands to more than {self._limits.max_ratio:g} times its size in it"
                        )
                    if self._total > self._limits.max_bytes:
                        raise invalid_archive(f"its files are larger than {self._limits.max_bytes} bytes in all")
                    yield block
        except _BROKEN as error:
            raise PipelineError(
                ErrorCode.CORRUPT_FILE, f"{name!r} is damaged in the archive ({error}). Make the archive anew."
            ) from error
