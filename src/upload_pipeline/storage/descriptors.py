"""File descriptors that threads use and a cancelled task can still close safely.

Cancelling a task does not stop the thread that works for it. Closing the descriptor under that thread could
let it read or write a file that was given the same number since, so use and close take turns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor


class GuardedDescriptor:
    """A file descriptor; each call blocks, so it belongs in a thread, except `release`.

    Args:
        opener: opens the file and gives the descriptor; called by `open`, at most once.
    """

    __slots__ = ("_closed", "_descriptor", "_opener", "_turn")

    def __init__(self, opener: Callable[[], int]) -> None:
        self._opener = opener
        self._descriptor: int | None = None
        self._closed = False
        self._turn = threading.Lock()

    def open(self) -> None:
        """Opens the file, unless it was closed before it could be.

        Raises:
            OSError: the opener's, or the descriptor was closed already.
        """
        with self._turn:
            if self._closed:
                raise OSError("the file was closed meanwhile")
            if self._descriptor is None:
                self._descriptor = self._opener()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes from the current position; empty at the end of the file.

        Raises:
            OSError: the read failed or the file is not open.
        """
        with self._turn:
            return os.read(self._number(), size)

    def write(self, data: bytes) -> None:
        """Writes all of `data` at the current position.

        Raises:
            OSError: the write failed or the file is not open.
        """
        with self._turn:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._number(), rest) :]

    def sync(self) -> None:
        """Waits until what was written is on the disk.

        Raises:
            OSError: the disk failed or the file is not open.
        """
        with self._turn:
            os.fsync(self._number())

    def close(self) -> bool:
        """Closes the file once no call is using it, for good; safe to repeat. Gives whether it was open."""
        with self._turn:
            return self._close()

    def release(self, executor: Executor) -> None:
        """Closes without waiting: now where nobody uses the file, else in a thread when its turn comes."""
        if self._turn.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._turn.release()
        else:
            executor.submit(self.close)

    def _close(self) -> bool:
        self._closed = True
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    def _number(self) -> int:
        if self._descriptor is None:
            raise OSError("the file is not open")
        return self._descriptor
