"""Files shown to a virus scanner on their way into the store: clamd's INSTREAM (clamd(8), section COMMANDS).

    zINSTREAM NUL, then each piece as a length of 4 bytes in network order and its bytes, then a length of 0

The answer is `stream: OK`, `stream: <signature> FOUND` or `<reason> ERROR`, each with a NUL behind it. Whatever else
comes, or does not come, is no answer: a file counts as clean only where clamd has had all of it and says so.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from upload_pipeline.errors import ErrorCode, PipelineError

SETTING = "UPLOAD_PIPELINE_CLAMD_URL"

SCAN_SECONDS = 120.0
"""Default bound of each wait for the scanner; clamd itself gives up on a file after as many seconds (MaxScanTime)."""

PIECE_BYTES = 512 * 1024
"""Most bytes that are handed over at once."""

_LONGEST_ANSWER = 4096
_FOUND = re.compile(rb"stream: (.+) FOUND")

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class VirusScanner:
    """A clamd; open one with `open_scanner`.

    Attributes:
        url: `tcp://host:port` or `unix:///path`.
        seconds: bound of each wait for it.
    """

    url: str
    seconds: float = SCAN_SECONDS

    @asynccontextmanager
    async def scan(self, filename: str) -> AsyncGenerator[Scan, None]:
        """The scan of one file. Its bytes go through `Scan.passing`, then `Scan.verdict` says whether it is clean.

        Raises:
            PipelineError: `SCANNER_UNAVAILABLE` where clamd does not take the connection.
        """
        connected = await _connect(self)
        try:
            scan = Scan(self, connected, filename)
            await scan.begin()
            yield scan
        finally:
            connected.close()

    async def version(self) -> str:
        """What clamd calls itself and its signatures.

        Raises:
            PipelineError: `SCANNER_UNAVAILABLE`.
        """
        connected = await _connect(self)
        try:
            await _command(self, connected, b"zVERSION\0")
            answer = await _answer(self, connected)
        finally:
            connected.close()
        if not answer.startswith(b"ClamAV "):
            raise _unavailable(self, f"it answers {_shown(answer)} where its version was asked for")
        return _shown(answer)

    async def check(self, max_bytes: int) -> None:
        """Has clamd scan so many zero bytes.

        Raises:
            PipelineError: `SCANNER_UNAVAILABLE`, also where its StreamMaxLength is less; `MALWARE_FOUND` where its
                MaxFileSize or MaxScanSize is less and AlertExceedsMax is on.
        """
        async with self.scan("a file of the largest size that is taken") as scan:
            async for _ in scan.passing(_zeros(max_bytes)):
                pass
            await scan.verdict()


@dataclass(slots=True)
class Scan:
    """One file on its way through the scanner."""

    scanner: VirusScanner
    connected: socket.socket
    filename: str
    _handed_over: bool = field(default=False, init=False)

    async def begin(self) -> None:
        """Opens the stream; `VirusScanner.scan` does it."""
        await _command(self.scanner, self.connected, b"zINSTREAM\0")

    async def passing(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The same chunks, each one once clamd has it: the slower of both sides sets the pace, and nothing piles up.

        Raises:
            PipelineError: as `verdict` does. What `chunks` raises comes out unchanged.
        """
        async for chunk in chunks:
            # Of an empty chunk nothing is sent: a length of 0 would end the stream.
            for start in range(0, len(chunk), PIECE_BYTES):
                await self._hand_over(memoryview(chunk)[start : start + PIECE_BYTES])
            yield chunk
        self._handed_over = True

    async def verdict(self) -> None:
        """Returns where clamd has had every byte and finds nothing.

        Raises:
            PipelineError: `MALWARE_FOUND` with the name of the `signature`; `SCANNER_UNAVAILABLE` in every other case.
        """
        if not self._handed_over:
            raise _unavailable(self.scanner, "not all bytes of the file have passed it")
        await self._hand_over(memoryview(b""))
        self._judge(await _answer(self.scanner, self.connected), whole=True)

    async def _hand_over(self, piece: memoryview) -> None:
        try:
            async with asyncio.timeout(self.scanner.seconds):
                await _send_all(self.connected, struct.pack("!I", len(piece)))
                if piece:  # behind the end clamd may have answered and hung up, and even sending nothing fails then
                    await _send_all(self.connected, piece)
        except TimeoutError as error:
            raise _unavailable(self.scanner, f"it reads no further within {self.scanner.seconds:g} s") from error
        except OSError as error:
            # It hangs up on what it will not read any more, and may have said why.
            self._judge(await _answer(self.scanner, self.connected), whole=False)
            raise AssertionError("no answer to half a file is a good one") from error

    def _judge(self, answer: bytes, *, whole: bool) -> None:
        if (found := _FOUND.fullmatch(answer)) is not None:
            signature = _shown(found[1])
            raise PipelineError(
                ErrorCode.MALWARE_FOUND,
                f"{self.filename!r} is refused: the virus scanner finds {signature} in it. Send a clean file, or ask "
                "the operator where this must be a mistake.",
                {"filename": self.filename, "signature": signature},
            )
        if answer == b"stream: OK" and whole:
            return
        if b"size limit exceeded" in answer:
            raise _unavailable(
                self.scanner,
                "the file is longer than its StreamMaxLength. Raise StreamMaxLength, MaxFileSize and MaxScanSize in "
                "clamd.conf to the largest file that is taken",
            )
        raise _unavailable(self.scanner, f"it answers {_shown(answer)}")


def open_scanner(url: str, *, seconds: float = SCAN_SECONDS) -> VirusScanner | None:
    """The scanner that a URL names; None for an empty one. Nothing is connected yet.

    Raises:
        PipelineError: `SETTING_INVALID` naming the setting, the value and what is allowed.
    """
    if not url:
        return None
    try:
        _address(url)
    except ValueError as error:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"{SETTING}={url!r} is not allowed: it must be tcp://<host>:<port> or unix:///<path of clamd's socket>.",
            {"setting": SETTING, "value": url},
        ) from error
    return VirusScanner(url, seconds)


def _address(url: str) -> str | tuple[str, int]:
    """The path of a socket, or host and port.

    Raises:
        ValueError: the URL is neither.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment or "\0" in url:
        raise ValueError(url)
    if parts.scheme == "unix" and not parts.netloc and len(parts.path) > 1:
        return parts.path
    if parts.scheme == "tcp" and parts.hostname and parts.port and parts.path in ("", "/") and not parts.username:
        return parts.hostname, parts.port
    raise ValueError(url)


async def _connect(scanner: VirusScanner) -> socket.socket:
    return await _bounded(scanner, _connected(_address(scanner.url)), "takes no connection", "takes no connection")


async def _connected(address: str | tuple[str, int]) -> socket.socket:
    loop = asyncio.get_running_loop()
    found: list[tuple[socket.AddressFamily, Any]] = []
    if isinstance(address, str):
        found = [(socket.AF_UNIX, address)]
    else:
        named = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
        found = [(family, target) for family, _, _, _, target in named]
    failure: OSError = ConnectionRefusedError("its host has no address")
    for family, target in found:
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.setblocking(False)
            await loop.sock_connect(opened, target)
        except OSError as error:
            opened.close()
            failure = error
        except BaseException:
            opened.close()
            raise
        else:
            return opened
    raise failure


async def _command(scanner: VirusScanner, connected: socket.socket, command: bytes) -> None:
    await _bounded(scanner, _send_all(connected, command), "hung up", "takes no command")


async def _send_all(connected: socket.socket, data: bytes | memoryview) -> None:
    await asyncio.get_running_loop().sock_sendall(connected, data)


async def _answer(scanner: VirusScanner, connected: socket.socket) -> bytes:
    """What it says, without the NUL behind it.

    Raises:
        PipelineError: `SCANNER_UNAVAILABLE` where no whole answer comes.
    """
    loop = asyncio.get_running_loop()
    answer = b""

    async def read() -> None:
        nonlocal answer
        while b"\0" not in answer and len(answer) <= _LONGEST_ANSWER:
            part = await loop.sock_recv(connected, _LONGEST_ANSWER)
            if not part:
                return
            answer += part

    await _bounded(scanner, read(), "hung up without an answer", "gives no answer")
    told, nul, rest = answer.partition(b"\0")
    if not nul or rest:
        raise _unavailable(scanner, f"its answer is cut off or garbled: {_shown(answer)}")
    return told


async def _bounded(scanner: VirusScanner, work: Awaitable[R], failed: str, silent: str) -> R:
    try:
        async with asyncio.timeout(scanner.seconds):
            return await work
    except TimeoutError as error:
        raise _unavailable(scanner, f"it {silent} within {scanner.seconds:g} s") from error
    except OSError as error:
        raise _unavailable(scanner, f"it {failed}: {error.strerror or error}") from error


async def _zeros(count: int) -> AsyncGenerator[bytes, None]:
    block = bytes(PIECE_BYTES)
    for start in range(0, count, PIECE_BYTES):
        yield block[: count - start]


def _unavailable(scanner: VirusScanner, reason: str) -> PipelineError:
    return PipelineError(
        ErrorCode.SCANNER_UNAVAILABLE,
        f"The virus scanner at {scanner.url} does not answer for the file: {reason}. Nothing is taken unscanned: check "
        f"clamd, and that {SETTING} names it, then try again.",
        {"url": scanner.url},
    )


def _shown(answer: bytes) -> str:
    text = answer[:200].decode("ascii", "backslashreplace")
    return "".join(character if character.isprintable() else "?" for character in text) or "nothing"
