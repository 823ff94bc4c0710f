"""Requests written byte by byte, for what no client library would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error of the common body."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


@dataclass(frozen=True)
class Connection:
    """A connection to a service."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def start(self, method: str, path: str, **headers: str) -> None:
        """Sends the head of a request; underscores of header names become hyphens."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def send(self, data: bytes) -> None:
        """Sends bytes of the body."""
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        """Sends bytes of a body whose length was not announced."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def answer(self) -> Answer:
        """Reads one answer, which must have a Content-Length."""
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(first.split()[1]), headers, body)

    async def closed(self) -> bool:
        """Whether the other side closes, with nothing more said."""
        try:
            async with asyncio.timeout(10):
                return await self.reader.read() == b""
        except ConnectionResetError:
            return True


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """A connection, broken off where it is still open in the end."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()
