"""Running a task on a hostile file in a process that cannot hurt this one.

Each task runs in a fork of its own with limits on memory, CPU, time and output, no open files but its own, no
secrets in its environment and a temporary folder that goes with it. However it ends, `ProcessGuard.run`
returns its result or raises an error that says why. What it raises is in terms of parsing, since that is what
it is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Final

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers import fork_server

_START_SECONDS: Final = 60.0
"""How long the server may take to import what it needs and to fork; measured 0.3 s, on a loaded machine 2 s."""
_KILL_SECONDS: Final = 10.0
"""How long a killed task may take to be gone before the server itself is given up."""
_STOP_SECONDS: Final = 2.0
_ERROR_TAIL_BYTES: Final = 2000
_HEADER_BYTES: Final = 65536
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
"""Environment variables that a task may see: what finding Python and its libraries takes, and no secrets."""

_CRASHES: Final = frozenset(
    {
        signal.SIGABRT,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGFPE,
        signal.SIGTRAP,
        signal.SIGSYS,
    }
)
_MEMORY_WORDS: Final = (b"memory allocation of", b"bad_alloc", b"MemoryError", b"out of memory")
_MEMORY_SHARE: Final = 6
"""A process that aborts with a sixth of its memory in use aborted for memory: a buffer that doubles holds n while
it asks for 2n, and up to half of the limit may be reserved without being in use."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one task may use.

    Attributes:
        wall_seconds: by the clock, from the moment its process runs.
        memory_bytes: of writable memory, beyond what the server has imported (about 40 MB).
        output_bytes: of its result.
    """

    wall_seconds: float
    memory_bytes: int
    output_bytes: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.wall_seconds) and self.wall_seconds > 0):
            raise ValueError(f"wall_seconds must be positive, got {self.wall_seconds}")
        if self.memory_bytes <= 0 or self.output_bytes <= 0:
            raise ValueError(f"limits must be positive, got {self}")


@dataclass(frozen=True, slots=True)
class GuardedResult:
    """What a task returned: facts, and bytes."""

    header: dict[str, Any]
    body: bytes


@dataclass(frozen=True, slots=True)
class _Server:
    process: subprocess.Popen[bytes]
    control: socket.socket
    folder: str


class ProcessGuard:
    """Runs tasks, each in a process of its own, forked from one server that has the imports done.

    The server starts with the first task and again should it die. One guard may be used from several threads
    and event loops. It stops with `close`, when the guard is forgotten, and when this process ends in any way.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        """Args: `preload`: modules that the server imports once, so that tasks find them imported."""
        self._preload = tuple(preload)
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    async def run(self, task: str, arguments: Mapping[str, Any], limits: Limits) -> GuardedResult:
        """Runs one task and waits for it. Cancelling the wait kills the task.

        Args:
            task: `module:function`; the function takes `arguments` as a dict and returns a JSON-serialisable
                dict and bytes.
            arguments: JSON-serialisable.
            limits: what it may use.

        Raises:
            PipelineError: what the task raised; `PARSE_TIMEOUT`, `PARSE_MEMORY`, `PARSE_CRASHED`, or
                `PARSE_FAILED` for any other exception and for a result over its limit; `INTERNAL` when
                the server could not run it, which says nothing about the file.
        """
        request = json.dumps({"task": task, "arguments": dict(arguments), "limits": asdict(limits)}).encode()
        with contextlib.ExitStack() as stack:
            channel, theirs = socket.socketpair()
            stack.enter_context(channel)  # closing it is what kills the task, should we leave early
            channel.setblocking(False)
            with theirs:
                output = stack.enter_context(tempfile.TemporaryFile())
                errors = stack.enter_context(tempfile.TemporaryFile())
                server = self._submit(request, (theirs.fileno(), output.fileno(), errors.fileno()))
            await self._await_start(server, channel)
            status, peak_kib, timed_out = await self._await_end(server, channel, limits)
            return await asyncio.to_thread(_outcome, status, peak_kib, timed_out, limits, output, errors)

    def close(self) -> None:
        """Stops the server and with it all tasks. A later `run` starts it again."""
        with self._lock:
            self._discard()

    async def _await_start(self, server: _Server, channel: socket.socket) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                kind, value, _ = await self._receive(server, channel)
        except TimeoutError:
            self._give_up(server)
            raise PipelineError(
                ErrorCode.INTERNAL, f"The parser's server did not start a task within {_START_SECONDS:.0f} s."
            ) from None
        if kind != fork_server.STARTED:
            raise PipelineError(
                ErrorCode.INTERNAL,
                f"The parser's process could not be started: {os.strerror(value)}. Free memory or process slots.",
                {"errno": value},
            )

    async def _await_end(self, server: _Server, channel: socket.socket, limits: Limits) -> tuple[int, int, bool]:
        """Waits until the task is gone, killing it at its deadline: wait status, peak KiB, whether we killed."""
        receiving = asyncio.ensure_future(self._receive(server, channel))
        try:
            done, _ = await asyncio.wait((receiving,), timeout=limits.wall_seconds)
            timed_out = not done
            if timed_out:
                channel.shutdown(socket.SHUT_WR)
                done, _ = await asyncio.wait((receiving,), timeout=_KILL_SECONDS)
                if not done:
                    self._give_up(server)
                    raise _timeout_error(limits)
            _, status, peak_kib = receiving.result()
            return status, peak_kib, timed_out
        finally:
            if not receiving.done():
                receiving.cancel()
                await asyncio.wait((receiving,))  # the loop must let go of the socket before it closes

    async def _receive(self, server: _Server, channel: socket.socket) -> tuple[bytes, int, int]:
        loop = asyncio.get_running_loop()
        record = b""
        while len(record) < fork_server.RECORD.size:
            try:
                piece = await loop.sock_recv(channel, fork_server.RECORD.size - len(record))
            except ConnectionError:
                piece = b""
            if not piece:
                self._give_up(server)
                raise PipelineError(
                    ErrorCode.INTERNAL,
                    "The parser's server ended in the middle of a task; its error output has the reason.",
                )
            record += piece
        kind, first, second = fork_server.RECORD.unpack(record)
        return kind, first, second

    def _submit(self, request: bytes, descriptors: tuple[int, int, int]) -> _Server:
        """Hands a task to the server, which is started if there is none alive."""
        with self._lock:
            for attempt in (1, 2):
                server = self._running()
                try:
                    message = len(request).to_bytes(4, "big") + request
                    sent = socket.send_fds(server.control, [message], list(descriptors))
                    server.control.sendall(message[sent:])
                except OSError as error:  # it died since the last task
                    self._discard()
                    if attempt == 2:
                        raise PipelineError(
                            ErrorCode.INTERNAL, f"The parser's server cannot be reached: {error}."
                        ) from error
                else:
                    return server
        raise AssertionError("unreachable")

    def _running(self) -> _Server:
        if self._server is not None and self._server.process.poll() is not None:
            self._discard()
        if self._server is None:
            self._server = _start_server(self._preload)
            self._finalizer = weakref.finalize(self, _stop_server, self._server)
        return self._server

    def _give_up(self, server: _Server) -> None:
        with self._lock:
            if self._server is server:
                self._discard(at_once=True)

    def _discard(self, *, at_once: bool = False) -> None:
        server, self._server = self._server, None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        if server is not None:
            if at_once:
                server.process.kill()
            _stop_server(server)


def _start_server(preload: Sequence[str]) -> _Server:
    ours, theirs = socket.socketpair()
    folder = tempfile.mkdtemp(prefix="upload-pipeline-parser-")
    with theirs:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        # The same order of sets and the same text encoding wherever this runs.
        environment |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", fork_server.__name__, str(theirs.fileno()), folder, *preload],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for the worker, which then decides
        )
    return _Server(process, ours, folder)


def _stop_server(server: _Server) -> None:
    server.control.close()
    try:
        server.process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    shutil.rmtree(server.folder, ignore_errors=True)  # it does so itself, unless it was killed


def _outcome(
    status: int, peak_kib: int, timed_out: bool, limits: Limits, output: IO[bytes], errors: IO[bytes]
) -> GuardedResult:
    """Turns how a task ended into its result or the error that it stands for."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if status == 0:
        return _result(limits, output)
    if number in (signal.SIGXCPU, signal.SIGALRM) or (timed_out and number == signal.SIGKILL):
        raise _timeout_error(limits)
    details = {"signal": signal.Signals(number).name} if number else {"exit": os.waitstatus_to_exitcode(status)}
    tail = _tail(errors)
    if number == signal.SIGKILL:
        raise PipelineError(
            ErrorCode.PARSE_MEMORY,
            "The process reading the file was killed from outside, as a system short of memory does."
            " Lower the worker's concurrency or give it more memory.",
            details,
        )
    starved = peak_kib * 1024 * _MEMORY_SHARE >= limits.memory_bytes
    if number in _CRASHES and (starved or any(word in tail for word in _MEMORY_WORDS)):
        raise PipelineError(
            ErrorCode.PARSE_MEMORY,
            f"The file needs more than the {limits.memory_bytes:,} bytes of memory allowed. It may be made to"
            " exhaust its reader; if it is genuine, raise UPLOAD_PIPELINE_PARSE_MEMORY_BYTES.",
            details | {"limit": limits.memory_bytes},
        )
    raise PipelineError(
        ErrorCode.PARSE_CRASHED,
        "The process reading the file crashed; the file is damaged or made to do harm. Save it anew from its"
        " application and send that.",
        details | ({"output": tail.decode("utf-8", "replace")[-500:]} if tail else {}),
    )


def _result(limits: Limits, output: IO[bytes]) -> GuardedResult:
    size = output.seek(0, os.SEEK_END)
    if size > limits.output_bytes + _HEADER_BYTES:
        raise PipelineError(ErrorCode.PARSE_FAILED, f"The result is too large: {size:,} bytes. Split the file.")
    output.seek(0)
    first, _, body = output.read().partition(b"\n")
    try:
        header = json.loads(first)
        if header["ok"]:
            return GuardedResult(dict(header["result"]), body)
        error = PipelineError(ErrorCode(header["code"]), str(header["message"]), dict(header["details"]))
    except (ValueError, KeyError, TypeError) as problem:
        raise PipelineError(
            ErrorCode.PARSE_CRASHED, "The process reading the file left no readable result."
        ) from problem
    raise error


def _timeout_error(limits: Limits) -> PipelineError:
    return PipelineError(
        ErrorCode.PARSE_TIMEOUT,
        f"Reading the file took longer than {limits.wall_seconds:g} s and was stopped. If the file is genuine,"
        " raise UPLOAD_PIPELINE_PARSE_TIMEOUT.",
        {"limit": limits.wall_seconds},
    )


def _tail(errors: IO[bytes]) -> bytes:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _ERROR_TAIL_BYTES))
    return errors.read()
