"""One durable write into a local store: unfinished file, sync, rename.

obstore's local store (0.12.1) writes beside the target under a guessable name, readable by all, and syncs
neither file nor directory (seen with strace), so an upload that was acknowledged could be gone after a power
cut.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from uuid import uuid4

from upload_pipeline.storage.descriptors import GuardedDescriptor
from upload_pipeline.storage.local_tree import FILE_MODE, UNFINISHED, LocalTree


class LocalWrite:
    """Bytes on their way to a key: `open`, `write` any number of times, `commit`.

    `discard` ends it in any case. All calls block and may come from different threads. Before `commit`
    nothing stands under the key; after it all does. A process that dies in between leaves a file in the
    unfinished directory, nowhere else.
    """

    __slots__ = ("_file", "_given_up", "_name", "_tree", "_turn")

    def __init__(self, tree: LocalTree) -> None:
        self._tree = tree
        self._name = uuid4().hex
        self._file = GuardedDescriptor(self._create)
        self._given_up = False
        self._turn = threading.Lock()

    def open(self) -> None:
        """Makes the unfinished file."""
        self._file.open()

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        self._file.write(data)

    def commit(self, key: str) -> None:
        """Puts the whole file under the key, replacing what stood there; returns when that is on the disk."""
        with self._turn:
            self._file.sync()
            self._file.close()
            with self._tree.directory((UNFINISHED,)) as parent:
                if self._given_up:
                    raise OSError("the write was given up")
                self._tree.rename_into(parent, self._name, key)

    def give_up(self) -> None:
        """Makes a `commit` that has not renamed yet fail. Does not block."""
        self._given_up = True

    def discard(self) -> None:
        """Removes the unfinished file where there still is one; safe to repeat and after `commit`."""
        self.give_up()
        self._file.close()
        with self._turn, suppress(FileNotFoundError), self._tree.directory((UNFINISHED,)) as parent:
            os.unlink(self._name, dir_fd=parent)

    def _create(self) -> int:
        with self._tree.directory((UNFINISHED,), create=True) as parent:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self._name, flags, FILE_MODE, dir_fd=parent)
