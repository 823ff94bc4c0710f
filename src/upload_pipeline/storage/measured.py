"""Bytes measured while they pass: size, sha256, first bytes, and a limit."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from upload_pipeline.storage.failures import too_large
from upload_pipeline.storage.objects import StoredObject

BLOCK_BYTES = 256 * 1024
"""Bytes handed on at once: many enough that a visit to a thread costs little, few enough that many uploads at once hold
little. `scripts/bench upload-memory` tells: 37 MB, and of twice as many 59 MB for the same time of the processor."""


class MeasuredStream:
    """Regroups chunks of any size into blocks of `BLOCK_BYTES` (the last one shorter) and measures them.

    Args:
        key: what the bytes become, for messages.
        chunks: the source; closed when this stream ends, if it can be.
        max_bytes: the limit, or `None`.
        head_bytes: how many of the first bytes to keep.
        on_progress: called each time that bytes have moved.

    Attributes:
        failure: what the source, or the limit, raised; tells a failing source from a failing store.
        waiting: whether the source is being waited for.
    """

    __slots__ = (
        "_chunks",
        "_digest",
        "_head",
        "_head_bytes",
        "_key",
        "_max_bytes",
        "_on_progress",
        "_size",
        "failure",
        "waiting",
    )

    def __init__(
        self,
        key: str,
        chunks: AsyncIterator[bytes],
        *,
        max_bytes: int | None,
        head_bytes: int,
        on_progress: Callable[[], None],
    ) -> None:
        self._key = key
        self._chunks = chunks
        self._max_bytes = max_bytes
        self._head_bytes = head_bytes
        self._on_progress = on_progress
        self._digest = hashlib.sha256()
        self._head = bytearray()
        self._size = 0
        self.failure: Exception | None = None
        self.waiting = False

    def result(self) -> StoredObject:
        """What has passed so far."""
        return StoredObject(self._key, self._size, self._digest.hexdigest(), bytes(self._head))

    async def blocks(self) -> AsyncGenerator[bytes, None]:
        """The blocks; to be iterated once.

        Raises:
            PipelineError: `FILE_TOO_LARGE`, before the block that would exceed the limit is given.
        """
        pending = bytearray()
        try:
            while (chunk := await self._next()) is not None:
                self._count(chunk)
                # A large chunk is cut where it lies, so that no second copy of it is ever whole.
                rest = memoryview(chunk)
                while rest:
                    taken = BLOCK_BYTES - len(pending)
                    pending += rest[:taken]
                    rest = rest[taken:]
                    if len(pending) == BLOCK_BYTES:
                        block = bytes(pending)
                        pending.clear()
                        yield await self._digested(block)
            if pending:
                yield await self._digested(bytes(pending))
        finally:
            close = getattr(self._chunks, "aclose", None)
            if close is not None:
                await close()

    async def _next(self) -> bytes | None:
        self.waiting = True  # stays so when the wait is cancelled: whoever cancelled it wants to know
        try:
            chunk = await anext(self._chunks, None)
        except Exception as error:
            self.failure = error
            self.waiting = False
            raise
        self.waiting = False
        self._on_progress()
        return chunk

    def _count(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._max_bytes is not None and self._size > self._max_bytes:
            self.failure = too_large(self._max_bytes, self._key)
            raise self.failure
        if len(self._head) < self._head_bytes:
            self._head += chunk[: self._head_bytes - len(self._head)]

    async def _digested(self, block: bytes) -> bytes:
        await asyncio.to_thread(self._digest.update, block)
        self._on_progress()
        return block
