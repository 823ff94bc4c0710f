"""A proxy in front of Postgres that can turn into a black hole: sockets stay open, and nothing passes any more."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from psycopg.conninfo import conninfo_to_dict


class SilentProxy:
    """Listens on a TCP port of this machine, from a thread of its own, and hands on to a database's socket."""

    def __init__(self, url: str) -> None:
        parts = conninfo_to_dict(url)
        self._socket = f"{parts['host']}/.s.PGSQL.{parts.get('port', 5432)}"
        self._name = (parts["user"], parts["dbname"])
        self._silent = False
        self._generation = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0
        self.accepted = 0

    @property
    def url(self) -> str:
        """The database, through the proxy."""
        user, database = self._name
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}?sslmode=disable"

    def silence(self) -> None:
        """From now on nothing passes, in either direction, and new connections are taken and not answered."""
        self._silent = True
        self._generation += 1

    def heal(self) -> None:
        """New connections work again; those that were silenced stay dead for ever."""
        self._silent = False

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._open.add(writer)
        if self._silent:
            return
        generation = self._generation
        server_reader, server_writer = await asyncio.open_unix_connection(self._socket)
        self._open.add(server_writer)
        await asyncio.gather(
            self._pass_on(reader, server_writer, generation), self._pass_on(server_reader, writer, generation)
        )

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if generation != self._generation:
                    continue
                writer.write(data)
                await writer.drain()
        if generation == self._generation:
            writer.close()
