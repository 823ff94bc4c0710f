"""The directory tree of a local store: blocking calls that never leave it.

Every path is walked one part at a time from the root with `O_NOFOLLOW`, so a symbolic link below the root is
an error and not a way out, whoever put it there and whenever. (The root itself may be a link: that is the
operator's choice.) What is made is for the owner only.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.failures import denied, missing
from upload_pipeline.storage.keys import is_valid_key
from upload_pipeline.storage.objects import ObjectInfo

UNFINISHED = ".unfinished"
"""Directory below the root where a write lives until it is whole; no valid key starts with a dot."""

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600

_OWN_DEPTH = 3
"""How far down a directory is that belongs to one document, as `parsed/<user>/<document>`."""

_RENAMES = 20
"""Tries of a rename whose directory another takes away."""

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class LocalTree:
    """The tree below `root`, which exists."""

    root: Path

    @contextmanager
    def directory(self, parts: tuple[str, ...], *, create: bool = False, durable: bool = False) -> Iterator[int]:
        """An open descriptor of a directory below the root.

        Args:
            parts: names from the root downwards.
            create: makes what is missing.
            durable: when the block ends well, syncs this directory and each above it, so that names added in
                it, and the directories themselves, survive a power cut.

        Raises:
            FileNotFoundError: a directory is missing and `create` is false, or the root is.
            NotADirectoryError: a file stands where a directory is needed.
            PipelineError: `STORAGE_DENIED` for a symbolic link on the way.
        """
        chain = [os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        try:
            for part in parts:
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(part, DIRECTORY_MODE, dir_fd=chain[-1])
                chain.append(_open_directory(part, chain[-1]))
            yield chain[-1]
            if durable:
                for descriptor in reversed(chain):
                    os.fsync(descriptor)
        finally:
            for descriptor in chain:
                os.close(descriptor)

    def open_for_reading(self, key: str) -> int:
        """A descriptor of the object's bytes.

        Raises:
            PipelineError: `OBJECT_MISSING` where there is no object, `STORAGE_DENIED` for a symbolic link on
                the way or at its end.
            OSError: anything else that went wrong.
        """
        folders, name = _split(key)
        try:
            with self.directory(folders) as parent:
                # O_NONBLOCK: opening a FIFO that somebody left here must not wait for its writer.
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._require_root()
            raise missing(key) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _linked(name) from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise missing(key)
        return descriptor

    def info(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or `None` where there is none.

        Raises:
            PipelineError: `STORAGE_DENIED` for a symbolic link on the way or at its end.
            OSError: anything else that went wrong.
        """
        folders, name = _split(key)
        try:
            with self.directory(folders) as parent:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            self._require_root()
            return None
        if stat.S_ISLNK(status.st_mode):
            raise _linked(name)
        return _info(key, status) if stat.S_ISREG(status.st_mode) else None

    def move(self, source: str, target: str) -> bool:
        """Renames an object in one step, replacing what stands at `target`; false where `source` is missing.

        Its time becomes now, as where a move is a copy. Returns after the new name, and the end of the old one, are on
        the disk.
        """
        if self.info(source) is None:
            return False
        source_folders, source_name = _split(source)
        try:
            with self.directory(source_folders, durable=True) as parent:
                os.utime(source_name, dir_fd=parent, follow_symlinks=False)
                self.rename_into(parent, source_name, target)
        except FileNotFoundError:
            if self.info(source) is None:
                return False
            raise
        return True

    def rename_into(self, source_directory: int, source_name: str, target: str) -> None:
        """Renames a file of an open directory to the key `target`, durably.

        Raises:
            PipelineError: `INVALID_KEY` where the key needs a file to be a directory or the reverse.
            OSError: anything else that went wrong.
        """
        folders, name = _split(target)
        try:
            for left in reversed(range(_RENAMES)):
                try:
                    with self.directory(folders, create=True, durable=True) as parent:
                        os.rename(source_name, name, src_dir_fd=source_directory, dst_dir_fd=parent)
                    return
                except FileNotFoundError:
                    # The source is gone; or `remove` has taken the empty directory away between here and there.
                    os.stat(source_name, dir_fd=source_directory, follow_symlinks=False)
                    if not left:
                        raise
        except (NotADirectoryError, IsADirectoryError) as error:
            raise PipelineError(
                ErrorCode.INVALID_KEY,
                f"The object key {target} cannot be used: another object's key is the beginning of this one, "
                "or this one of another's.",
                {"key": target},
            ) from error

    def remove(self, key: str) -> None:
        """Removes an object for good; one that is missing is fine.

        With the last object in it goes a directory that is a document's own, or one would stay of each ever deleted.
        """
        folders, name = _split(key)
        try:
            with self.directory(folders) as parent:
                os.unlink(name, dir_fd=parent)
                os.fsync(parent)
            if len(folders) >= _OWN_DEPTH:
                with self.directory(folders[:-1]) as above, suppress(OSError):  # not empty, or gone
                    os.rmdir(folders[-1], dir_fd=above)
        except (FileNotFoundError, NotADirectoryError):
            self._require_root()
        except IsADirectoryError:
            return  # a directory is no object

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects below a prefix (empty: all), in no order, read lazily.

        Leaves out what no key can name: links, hidden names, names with odd characters. What disappears while
        the walk goes on may or may not be in it.
        """
        parts = tuple(prefix.split("/")) if prefix else ()
        try:
            with self.directory(parts) as start:
                yield from _walk(start, prefix)
        except (FileNotFoundError, NotADirectoryError):
            self._require_root()

    def unfinished(self) -> Iterator[tuple[str, datetime]]:
        """Name and last write of each file of a write that has not ended, or never will."""
        with self.directory((UNFINISHED,), create=True) as parent, os.scandir(parent) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield entry.name, datetime.fromtimestamp(status.st_mtime, UTC)

    def _require_root(self) -> None:
        """A missing root is a store that is not there, never a store without objects."""
        self.root.stat()


def make_root(path: Path) -> None:
    """Makes the directory of a store, and what is missing above it, for the owner only.

    One that exists is left as it is: its permissions are the operator's.

    Raises:
        OSError: it cannot be made, or a file stands there.
    """
    for level in reversed([path, *path.parents]):
        with suppress(FileExistsError):
            level.mkdir(DIRECTORY_MODE)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file stands there", str(path))


def _open_directory(name: str, parent: int) -> int:
    try:
        return os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    except OSError as error:
        # A link is ENOTDIR on Linux and ELOOP or EMLINK elsewhere.
        if error.errno in {errno.ENOTDIR, errno.ELOOP, errno.EMLINK} and _is_link(name, parent):
            raise _linked(name) from error
        raise


def _is_link(name: str, parent: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _linked(name: str) -> PipelineError:
    return denied("follow a path", f"{name} is a symbolic link inside the store, which may hold none")


def _walk(directory: int, prefix: str) -> Iterator[ObjectInfo]:
    with os.scandir(directory) as entries:
        for entry in entries:
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            if not is_valid_key(key):
                continue
            if entry.is_dir(follow_symlinks=False):
                try:
                    below = os.open(entry.name, _DIRECTORY_FLAGS, dir_fd=directory)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                try:
                    yield from _walk(below, key)
                finally:
                    os.close(below)
            elif entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield _info(key, entry.stat(follow_symlinks=False))


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _split(key: str) -> tuple[tuple[str, ...], str]:
    *folders, name = key.split("/")
    return tuple(folders), name
