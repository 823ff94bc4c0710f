"""A directory of this machine as a place for objects."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import ParamSpec, TypeVar

from upload_pipeline.storage.descriptors import GuardedDescriptor
from upload_pipeline.storage.failures import missing
from upload_pipeline.storage.free_space import free_bytes
from upload_pipeline.storage.local_tree import UNFINISHED, LocalTree
from upload_pipeline.storage.local_write import LocalWrite
from upload_pipeline.storage.objects import OWN_URLS, ObjectInfo, SignedUrl
from upload_pipeline.storage.refusals import Refusal

THREADS = 8
"""Disk calls at once, in a pool apart from asyncio's own, which a busy parser or embedder may fill."""

LISTING_BATCH = 500
"""Entries that a listing fetches in one visit to a thread."""

DISCARD_SECONDS = 5.0
"""How long a failed write waits for its file to be gone before it reports anyway; the sweep finds the
file."""

P = ParamSpec("P")
R = TypeVar("R")


def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="object-store")


@dataclass(frozen=True, slots=True)
class LocalBackend:
    """Objects as files below a directory; see `storage.backend.Backend` for the methods."""

    tree: LocalTree
    executor: ThreadPoolExecutor = field(default_factory=_executor, repr=False)

    async def write(self, key: str, blocks: AsyncIterator[bytes]) -> None:
        """Writes an unfinished file, syncs it and renames it."""
        write = LocalWrite(self.tree)
        try:
            await self._run(write.open)
            async for block in blocks:
                await self._run(write.write, block)
            await self._run(write.commit, key)
        except BaseException as error:
            # The thread goes on even if this task is cancelled again here, so the file goes in any case.
            write.give_up()
            removal = asyncio.wrap_future(self.executor.submit(write.discard))
            await asyncio.wait([removal], timeout=DISCARD_SECONDS)
            if removal.done() and (failure := removal.exception()) is not None:
                error.add_note(f"Its unfinished file stays until the next sweep: {failure}")
            raise

    async def read(self, key: str, block_bytes: int) -> AsyncGenerator[bytes, None]:
        """Reads the file in a thread, one block at a time."""
        source = GuardedDescriptor(partial(self.tree.open_for_reading, key))
        try:
            await self._run(source.open)
            while block := await self._run(source.read, block_bytes):
                yield block
        finally:
            source.release(self.executor)

    async def head(self, key: str) -> ObjectInfo | None:
        """Looks at the file."""
        return await self._run(self.tree.info, key)

    async def move(self, source: str, target: str) -> None:
        """Renames the file."""
        if not await self._run(self.tree.move, source, target):
            raise missing(source)

    async def delete(self, keys: Sequence[str]) -> None:
        """Unlinks the files."""
        for key in keys:
            await self._run(self.tree.remove, key)

    async def list(self, prefix: str) -> AsyncGenerator[ObjectInfo, None]:
        """Walks the tree in a thread, a batch at a time."""
        walk = self.tree.walk(prefix)
        while batch := await self._run(_take, walk):
            for info in batch:
                yield info

    async def free_bytes(self) -> int | None:
        """What the file system has left for this process."""
        return await self._run(free_bytes, self.tree.root)

    async def remove_unfinished(self, older_than: datetime) -> int:
        """Unlinks unfinished files whose last write is older."""
        return await self._run(self._remove_unfinished, older_than)

    async def sign_put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None,
        expires_in: timedelta,
        caller_token: str | None,
    ) -> SignedUrl | None:
        """None: nobody but this machine reaches the directory."""
        return None

    async def sign_get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None
    ) -> SignedUrl | None:
        """None: nobody but this machine reaches the directory."""
        return None

    def refusal(self, error: Exception, setting: str) -> Refusal | None:
        """Nothing beside its number."""
        return None

    async def check_urls(self) -> str:
        """The service does."""
        return OWN_URLS

    async def close(self) -> None:
        """Nothing is open between calls."""

    def _remove_unfinished(self, older_than: datetime) -> int:
        removed = 0
        with self.tree.directory((UNFINISHED,), create=True) as parent:
            for name, modified_at in self.tree.unfinished():
                if modified_at < older_than:
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=parent)
                        removed += 1
        return removed

    async def _run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.wrap_future(self.executor.submit(call, *args, **kwargs))


def _take(walk: Iterator[ObjectInfo]) -> list[ObjectInfo]:
    return list(islice(walk, LISTING_BATCH))
