"""A store and a database that fail, or let something else happen, at a moment that the test names."""

from __future__ import annotations

import errno
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FailingBackend:
    """A store that fails in one of its methods, before or after it has done its work, as often as told."""

    inner: Any
    method: str
    after: bool = False
    times: int = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _fails(self, method: str, *, after: bool) -> None:
        if method == self.method and after == self.after and self.times > 0:
            self.times -= 1
            raise OSError(errno.EIO, "the disk failed")

    async def write(self, key: str, blocks: AsyncIterator[bytes]) -> None:
        self._fails("write", after=False)
        await self.inner.write(key, blocks)
        self._fails("write", after=True)

    async def move(self, source: str, target: str) -> None:
        self._fails("move", after=False)
        await self.inner.move(source, target)
        self._fails("move", after=True)

    async def read(self, key: str, block_bytes: int) -> AsyncIterator[bytes]:
        self._fails("read", after=False)
        async for block in self.inner.read(key, block_bytes):
            yield block
            self._fails("read", after=True)

    async def head(self, key: str) -> Any:
        self._fails("head", after=False)
        return await self.inner.head(key)

    async def delete(self, keys: list[str]) -> None:
        self._fails("delete", after=False)
        await self.inner.delete(keys)
        self._fails("delete", after=True)

    async def sign_put(self, key: str, **wanted: Any) -> Any:
        self._fails("sign_put", after=False)
        return await self.inner.sign_put(key, **wanted)


Hook = Callable[[], Awaitable[None]]


@dataclass
class HookedDatabase:
    """Runs something before or after the nth statement that names a verb or table; what it raises is the answer."""

    inner: Any
    before: dict[tuple[str, int], Hook] = field(default_factory=dict)
    after: dict[tuple[str, int], Hook] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    async def _hooked(self, method: str, query: str, *args: Any) -> Any:
        named = re.search(r"upload_pipeline\.(\w+)", query)
        assert named is not None, query
        verb = named[1]
        self.calls[verb] = count = self.calls.get(verb, 0) + 1
        if (hook := self.before.get((verb, count))) is not None:
            await hook()
        answer = await getattr(self.inner, method)(query, *args)
        if (hook := self.after.get((verb, count))) is not None:
            await hook()
        return answer

    async def fetchrow(self, query: str, *args: Any) -> Any:
        return await self._hooked("fetchrow", query, *args)

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        return list(await self.inner.fetch(query, *args))

    async def fetchval(self, query: str, *args: Any) -> Any:
        return await self._hooked("fetchval", query, *args)


def raising(error: BaseException) -> Hook:
    async def hook() -> None:
        raise error

    return hook
