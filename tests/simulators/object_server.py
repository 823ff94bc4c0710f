"""What the simulated object stores share: the objects, a server on the loopback address, and its bad days."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import md5
from typing import Any, Self
from uuid import uuid4

from aiohttp import web

CLIENT_MAX_BYTES = 512 * 1024 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Fault(StrEnum):
    """How an answer can go wrong."""

    SERVER_ERROR = "server_error"  # before anything is done: 500
    TIMEOUT = "timeout"  # before: 544, Supabase's own for a database that does not answer; 503 elsewhere
    SLOW_DOWN = "slow_down"  # before: 429, or 503 where the store has it so
    HANG = "hang"  # before: no answer, ever
    DROPPED = "dropped"  # done, and the connection is closed without an answer


@dataclass
class Stored:
    """An object."""

    data: bytes
    content_type: str = "application/octet-stream"
    headers: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    owner: str | None = None
    modified_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    object_id: str = field(default_factory=lambda: str(uuid4()))

    @property
    def etag(self) -> str:
        """Quoted, as in the header."""
        return f'"{md5(self.data).hexdigest()}"'  # noqa: S324 - what stores call an ETag

    def response(self, request: web.Request, **headers: str) -> web.Response:
        """The bytes as an answer; of a Range only those, of a HEAD only the headers."""
        told = {
            "Content-Type": self.content_type,
            "ETag": self.etag,
            "Last-Modified": self.modified_at.strftime("%a, %d %b %Y %H:%M:%S GMT"),
            "Accept-Ranges": "bytes",
            **self.headers,
            **headers,
        }
        if request.method == "HEAD":
            return web.Response(headers={**told, "Content-Length": str(len(self.data))})
        wanted = request.http_range
        if wanted.start is None and wanted.stop is None:
            return web.Response(body=self.data, headers=told)
        start, stop, _ = wanted.indices(len(self.data))
        if start >= stop:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(self.data)}"})
        told["Content-Range"] = f"bytes {start}-{stop - 1}/{len(self.data)}"
        return web.Response(status=206, body=self.data[start:stop], headers=told)


@dataclass
class Bucket:
    """A bucket: its objects, its limits, and the uploads in parts that have not ended."""

    objects: dict[str, Stored] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[int, bytes], str]] = field(default_factory=dict)
    max_bytes: int | None = None
    media_types: tuple[str, ...] = ()
    public: bool = False
    """Whether anybody may fetch its objects."""


@dataclass
class ObjectServer(ABC):
    """A server of buckets: `async with … as server: server.url`.

    Attributes:
        buckets: by name; looked at and changed by tests as they like.
        faults: share of requests for each fault, by `seed`.
        requests: how often each method and path was asked for.
        port: to listen on; 0 takes any that is free.
    """

    buckets: dict[str, Bucket] = field(default_factory=dict)
    faults: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    port: int = 0
    url: str = ""
    _asked: deque[tuple[Fault, str]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        unknown = set(self.faults) - set(Fault)
        if unknown:
            raise ValueError(f"there is no fault {', '.join(sorted(unknown))}")

    async def __aenter__(self) -> Self:
        """Serves on the loopback address."""
        self._chance = random.Random(self.seed)
        app = web.Application(client_max_size=CLIENT_MAX_BYTES, middlewares=[self._with_faults])
        self.add_routes(app.router)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._runner.cleanup()

    @abstractmethod
    def add_routes(self, router: web.UrlDispatcher) -> None:
        """The routes of the store."""

    @abstractmethod
    def refusal(self, fault: Fault) -> web.Response:
        """How the store words a fault that it answers."""

    def misbehave(self, fault: str, *, times: int = 1, of: str = "") -> None:
        """The next `times` requests whose method, path and query contain `of` have this fault."""
        self._asked.extend([(Fault(fault), of)] * times)

    def keys(self, bucket: str) -> set[str]:
        """The names of a bucket's objects."""
        return set(self.buckets[bucket].objects)

    @web.middleware
    async def _with_faults(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        what = f"{request.method} {request.path}"
        self.requests[what] += 1
        fault = self._next_fault(f"{request.method} {request.path_qs}")
        if fault is Fault.HANG:
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.05)
            return web.Response()
        if fault not in (None, Fault.DROPPED):
            await request.read()  # lest the connection break before the answer is seen
            return self.refusal(fault)
        answer = await handler(request)
        if fault is Fault.DROPPED and request.transport is not None:
            request.transport.abort()
        return answer

    def _next_fault(self, what: str) -> Fault | None:
        for position, (fault, of) in enumerate(self._asked):
            if of in what:
                del self._asked[position]
                return fault
        draw = self._chance.random()
        for name, share in self.faults.items():
            if draw < share:
                return Fault(name)
            draw -= share
        return None
