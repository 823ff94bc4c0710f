"""A real clamd with a tiny signature of our own, and servers on real sockets that misbehave as no clamd should."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

INFECTED = b"THIS-HARMLESS-TEXT-IS-OUR-TEST-SIGNATURE"
"""What the signature looks for."""

SIGNATURE = "UploadPipeline.Test.Harmless.UNOFFICIAL"
"""What clamd calls it; the end says that the signature is not one of ClamAV's."""

STREAM_MAX_BYTES = 4 * 1024 * 1024


def clamd_program() -> str | None:
    """Where clamd is; daemons are not on everybody's path."""
    return shutil.which("clamd", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


@contextmanager
def running_clamd(folder: Path, *, max_file_bytes: int = STREAM_MAX_BYTES) -> Iterator[str]:
    """A clamd on a socket in a folder with a short path; its URL."""
    program = clamd_program()
    if program is None:
        pytest.skip("clamd is not installed (Debian: clamav-daemon)")
    (folder / "signatures").mkdir()
    (folder / "signatures" / "own.ndb").write_text(f"UploadPipeline.Test.Harmless:0:*:{INFECTED.hex()}\n")
    configuration = folder / "clamd.conf"
    configuration.write_text(
        f"DatabaseDirectory {folder / 'signatures'}\n"
        f"LocalSocket {folder / 's'}\n"
        f"TemporaryDirectory {folder}\n"
        "Foreground yes\n"
        "SelfCheck 0\n"
        f"StreamMaxLength {STREAM_MAX_BYTES}\n"
        f"MaxFileSize {max_file_bytes}\n"
        "AlertExceedsMax yes\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-c", str(configuration)], stdout=log, stderr=subprocess.STDOUT)
    try:
        _await_listening(process, folder)
        yield f"unix://{folder / 's'}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_listening(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "log").read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(folder / "s"))
                probe.sendall(b"zPING\0")
                if probe.recv(10) == b"PONG\0":
                    return
            except OSError:
                pass
        time.sleep(0.02)
    raise AssertionError("clamd did not start")


@dataclass
class Conversation:
    """What a misbehaving scanner has on one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def read_stream(self, most: int | None = None) -> int:
        """Reads the command and the pieces, to the end of the stream or until it has `most` bytes; how many it has."""
        assert await self.reader.readuntil(b"\0") == b"zINSTREAM\0"
        had = 0
        while most is None or had < most:
            (length,) = struct.unpack("!I", await self.reader.readexactly(4))
            if length == 0:
                break
            had += len(await self.reader.readexactly(length))
        return had

    async def say(self, answer: bytes) -> None:
        self.writer.write(answer)
        await self.writer.drain()


Behaviour = Callable[[Conversation], Awaitable[None]]


@asynccontextmanager
async def misbehaving(behaviour: Behaviour) -> AsyncIterator[str]:
    """A server that does this on each connection, then hangs up; its URL."""

    conversations: set[asyncio.Task[None] | None] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.add(asyncio.current_task())
        try:
            await behaviour(Conversation(reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0, limit=65536)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        server.close()
        for conversation in conversations:
            assert conversation is not None
            conversation.cancel()
        await asyncio.gather(*filter(None, conversations), return_exceptions=True)
        await server.wait_closed()
