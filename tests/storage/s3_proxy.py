"""A proxy before the S3 server: it writes down what passes, and spoils what it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO

import aiohttp
from aiohttp import web
from yarl import URL

HOP_BY_HOP = {"transfer-encoding", "connection", "content-length", "content-encoding"}


@dataclass(frozen=True, slots=True)
class Passed:
    """A request on the wire; header names are in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]

    @property
    def kind(self) -> str:
        """The operation as S3 calls it, of those that write or fetch objects."""
        if "x-amz-copy-source" in self.headers:
            return "CopyObject"
        if self.method == "POST":
            names = {"uploads": "CreateMultipartUpload", "uploadId": "CompleteMultipartUpload", "delete": "Delete"}
            return next(name for query, name in names.items() if query in self.query)
        if self.method == "PUT":
            return "UploadPart" if "partNumber" in self.query else "PutObject"
        return "List" if "list-type" in self.query else self.method


Spoil = Callable[[web.Request, Passed, int], Awaitable[web.StreamResponse | None]]
"""Given a request, what it is and how many of its kind came before: an answer of its own, or None to let it pass."""


@dataclass(slots=True)
class Proxy:
    """What passed, in order; the others may be set at any time.

    Attributes:
        spoil: see there.
        cuts: after how many bytes the answers to the next GETs break off.
    """

    endpoint: str
    passed: list[Passed] = field(default_factory=list)
    spoil: Spoil | None = None
    cuts: list[int] = field(default_factory=list)

    def kinds(self) -> list[str]:
        return [request.kind for request in self.passed]


async def _cut(
    request: web.Request, status: int, headers: dict[str, str], whole: bytes, length: int
) -> web.StreamResponse:
    """So many bytes of the answer, and then the connection is gone."""
    response = web.StreamResponse(status=status, headers=headers | {"Content-Length": str(len(whole))})
    await response.prepare(request)
    await response.write(whole[:length])
    assert request.transport is not None
    request.transport.abort()
    return response


@asynccontextmanager
async def s3_proxy(target: str) -> AsyncIterator[Proxy]:
    """A proxy to the server at `target`, as long as the context lasts."""
    proxy = Proxy("")

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = Passed(request.method, request.path, dict(request.query), headers)
        before = proxy.kinds().count(seen.kind)
        proxy.passed.append(seen)
        if proxy.spoil is not None and (spoiled := await proxy.spoil(request, seen, before)) is not None:
            return spoiled
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            url = URL(target + request.raw_path, encoded=True)
            body = BytesIO(await request.read())  # as raw bytes aiohttp warns of a large one
            async with session.request(request.method, url, headers=request.headers, data=body) as answer:
                kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
                if request.method == "HEAD":
                    kept["Content-Length"] = answer.headers.get("Content-Length", "0")
                whole = await answer.read()
                if seen.method == "GET" and proxy.cuts and answer.status in (200, 206):
                    return await _cut(request, answer.status, kept, whole, proxy.cuts.pop(0))
                return web.Response(status=answer.status, headers=kept, body=whole)

    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        proxy.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield proxy
    finally:
        await runner.cleanup()
