"""The process that forks one guarded process for each task. Started by `guarded_process`, never by a person.

It imports what tasks need once, stays single-threaded so that forking is safe, and gives each task a fresh
fork: a task costs a few milliseconds rather than a start of the interpreter and its imports, and no task sees
what another left behind.

A task comes as one message on the control socket: four bytes of length (big-endian), that many bytes of JSON,
and three file descriptors: the task's socket, its output file, its error file. On the task's socket the server
sends `RECORD`s: `S` with the process id when the task has started, or `F` with the errno when it could not, and
`E` with the wait status and the peak resident size in KiB when it has ended. When the other end of the task's
socket closes, however that comes about, the task is killed; when the control socket closes, all are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upload_pipeline.errors import ErrorCode, PipelineError

RECORD = struct.Struct("!cqq")
STARTED, FAILED, ENDED = b"S", b"F", b"E"

TaskFunction = Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]

_ORPHAN_CHECK_SECONDS = 5.0
_OUTPUT_FD = 3
_ALARM_GRACE_SECONDS = 2.0
_ADDRESS_SLACK_BYTES = 1 << 30
"""Address space beyond the memory limit: code, mapped files, and malloc's arenas, reserved but never touched."""
_PR_SET_PDEATHSIG = 1
"""`prctl(2)`: have this process sent a signal when its parent dies."""
_RECURSION_LIMIT = 10_000
"""Python frames in a task: documents nest far deeper than the interpreter's default of 1,000."""


@dataclass(slots=True)
class _Job:
    pid: int
    channel: socket.socket
    folder: str


def main(arguments: list[str]) -> None:
    """Serves until the control socket closes.

    Args:
        arguments: the socket's descriptor, a folder to hold the tasks' own, modules to import first.
    """
    # Service managers signal whole groups; what ends this process is its owner closing the control socket.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(arguments[0]))
    for name in arguments[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    folder = arguments[1]
    try:
        _serve(control, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(control: socket.socket, parent_folder: str) -> None:
    owner = os.getppid()
    jobs: dict[int, _Job] = {}
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        serving = True
        while serving:
            for key, _ in selector.select(_ORPHAN_CHECK_SECONDS):
                if key.fileobj is control:
                    job = _accept(control, parent_folder)
                    if job is None:
                        serving = False
                    elif job.pid:
                        jobs[job.pid] = job
                        selector.register(job.channel, selectors.EVENT_READ, job)
                elif key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                else:
                    # The owner never writes here, so this is the end of its interest.
                    selector.unregister(key.data.channel)
                    _kill(key.data)
            for job in list(_ended(jobs)):
                with contextlib.suppress(KeyError):
                    selector.unregister(job.channel)
                job.channel.close()
            if os.getppid() != owner:
                serving = False
    for job in jobs.values():
        _kill(job)
        os.waitpid(job.pid, 0)


def _accept(control: socket.socket, parent_folder: str) -> _Job | None:
    """Takes one task and forks for it; None when the control socket has closed."""
    try:
        message, descriptors, _, _ = socket.recv_fds(control, 4, 3)
        while message and len(message) < 4:
            message += control.recv(4 - len(message))
        body = b""
        length = int.from_bytes(message[:4], "big")
        while message and len(body) < length:
            piece = control.recv(length - len(body))
            if not piece:
                return None
            body += piece
    except ConnectionError:
        return None
    if not message:
        return None
    channel_fd, output_fd, error_fd = descriptors
    channel = socket.socket(fileno=channel_fd)
    folder = tempfile.mkdtemp(dir=parent_folder)
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        _tell(channel, FAILED, error.errno or 0, 0)
        channel.close()
        os.close(output_fd)
        os.close(error_fd)
        shutil.rmtree(folder, ignore_errors=True)
        return _Job(0, channel, folder)
    if pid == 0:
        try:
            _become_task(server, output_fd, error_fd, folder, json.loads(body))
        except BaseException:  # noqa: BLE001 - nothing may run on in a second copy of the server
            traceback.print_exc()
        finally:
            os._exit(70)
    with contextlib.suppress(OSError):  # the child does the same; whoever is first
        os.setpgid(pid, pid)
    os.close(output_fd)
    os.close(error_fd)
    _tell(channel, STARTED, pid, 0)
    return _Job(pid, channel, folder)


def _ended(jobs: dict[int, _Job]) -> Iterator[_Job]:
    for pid, job in list(jobs.items()):
        if sys.platform != "darwin" and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            # Should it have had children of its own, they go with it: while it is not reaped, its group is its.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            del jobs[pid]
            shutil.rmtree(job.folder, ignore_errors=True)
            unit = 1 if sys.platform != "darwin" else 1024  # getrusage(2): KiB on Linux, bytes on macOS
            _tell(job.channel, ENDED, status, usage.ru_maxrss // unit)
            yield job


def _tell(channel: socket.socket, kind: bytes, first: int, second: int) -> None:
    # An owner that has gone needs no telling; two records always fit the socket's buffer.
    with contextlib.suppress(OSError):
        channel.sendall(RECORD.pack(kind, first, second))


def _kill(job: _Job) -> None:
    # Not reaped yet, so the id is still the task's own.
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(job.pid, signal.SIGKILL)


def _become_task(server: int, output_fd: int, error_fd: int, folder: str, request: dict[str, Any]) -> None:
    """Turns this fresh fork into the guarded process, runs the task and writes its answer. Never returns."""
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    _die_with(server)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _keep_only(output_fd, error_fd)
    os.chdir(folder)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    _set_limits(request["limits"])
    sys.setrecursionlimit(_RECURSION_LIMIT)
    header, body = _answer(request)
    try:
        _write(header, body)
    except OSError as error:  # over RLIMIT_FSIZE: Python ignores SIGXFSZ, so it comes as EFBIG
        os.ftruncate(_OUTPUT_FD, 0)
        os.lseek(_OUTPUT_FD, 0, os.SEEK_SET)
        _write(_error_header(ErrorCode.PARSE_FAILED, f"The result could not be written: {error}.", {}), b"")
    os._exit(0)


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Runs the task; whatever it raises becomes an error header."""
    try:
        module, _, name = request["task"].partition(":")
        task: TaskFunction = getattr(importlib.import_module(module), name)
        header, body = task(request["arguments"])
    except PipelineError as error:
        return _error_header(error.code, error.message, error.details), b""
    except MemoryError:
        limit = request["limits"]["memory_bytes"]
        return _error_header(
            ErrorCode.PARSE_MEMORY, f"The file needs more than the {limit:,} bytes of memory allowed.", {}
        ), b""
    except RecursionError:
        return _error_header(ErrorCode.PARSE_FAILED, "The file is nested too deeply to be read.", {}), b""
    except Exception as error:  # noqa: BLE001 - this is the process's outermost boundary
        text = f"{type(error).__name__}: {error}"[:500]
        return _error_header(ErrorCode.PARSE_FAILED, f"The file could not be read: {text}", {}), b""
    limit = request["limits"]["output_bytes"]
    if len(body) > limit:
        return _error_header(
            ErrorCode.PARSE_FAILED,
            f"The result is too large: {len(body):,} bytes, allowed are {limit:,}. Split the file.",
            {"bytes": len(body), "limit": limit},
        ), b""
    return {"ok": True, "result": header}, body


def _error_header(code: ErrorCode, message: str, details: dict[str, Any]) -> dict[str, Any]:
    return {"ok": False, "code": code.value, "message": message, "details": details}


def _write(header: dict[str, Any], body: bytes) -> None:
    with os.fdopen(_OUTPUT_FD, "wb", closefd=False) as output:
        output.write(json.dumps(header, ensure_ascii=True).encode("ascii") + b"\n")
        output.write(body)


def _die_with(server: int) -> None:
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        # Where a system runs out of memory, the task goes before the worker does.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if os.getppid() != server:  # it died before the call above
        os._exit(70)


def _keep_only(output_fd: int, error_fd: int) -> None:
    """Leaves descriptors 0 (nothing), 1 and 2 (the error file) and 3 (the output); closes all others."""
    # Moved up first: either may stand where another has to go.
    output, error = os.dup(output_fd), os.dup(error_fd)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (error, 1), (error, 2), (output, _OUTPUT_FD)):
        os.dup2(source, target)
    for entry in list(Path("/dev/fd").iterdir()):
        if int(entry.name) > _OUTPUT_FD:
            with contextlib.suppress(OSError):
                os.close(int(entry.name))


def _set_limits(limits: dict[str, Any]) -> None:
    seconds, memory = float(limits["wall_seconds"]), int(limits["memory_bytes"])
    cpu = int(seconds) + 2
    # RLIMIT_DATA counts what a process may write to and address space does not (setrlimit(2), Linux 4.7);
    # the address space gets a wall too, since shared mappings are in no other count.
    memory += _data_in_use()
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, int(limits["output_bytes"]) + 65536),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_AS, memory + _ADDRESS_SLACK_BYTES),
        (resource.RLIMIT_CPU, cpu),
    ):
        hard = resource.getrlimit(kind)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A little air above the soft limit of CPU seconds: the soft one ends with a signal that tells why.
        resource.setrlimit(kind, (allowed, hard if kind == resource.RLIMIT_CPU else allowed))
    # The owner kills at its deadline. Should it be unable to, the kernel does so a little later.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + _ALARM_GRACE_SECONDS)


def _data_in_use() -> int:
    """Bytes that RLIMIT_DATA counts already: what the server had imported before the fork."""
    if sys.platform != "linux":
        return 0
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[5]) * resource.getpagesize()  # proc(5): data + stack, in pages


if __name__ == "__main__":
    main(sys.argv[1:])
