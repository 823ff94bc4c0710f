from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sample_files import fork_servers_of, is_running, parent_of

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.guarded_process import Limits, ProcessGuard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory limits and /proc are Linux's")

MIB = 1024 * 1024
LIMITS = Limits(wall_seconds=20, memory_bytes=256 * MIB, output_bytes=MIB)

TASKS = """
    import ctypes, os, signal, socket, sys, tempfile, time
    from upload_pipeline.errors import ErrorCode, PipelineError

    def echo(arguments):
        return {"pid": os.getpid(), **arguments}, b"body\\n\\xff"

    def surroundings(arguments):
        def readable(fd):
            try:
                return os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                return None
        links = {fd: readable(fd) for fd in os.listdir("/proc/self/fd")}
        return {
            "files": {fd: link for fd, link in links.items() if link and "/proc/" not in link},
            "environment": dict(os.environ), "folder": os.getcwd(), "temporary": tempfile.gettempdir(),
        }, b""

    def litter(arguments):
        open("left-behind", "w").close()
        tempfile.mkstemp()
        return {"folder": os.getcwd()}, b""

    def note_and_sleep(arguments):
        with open(arguments["note"], "w") as note:
            note.write(str(os.getpid()))
        time.sleep(600)

    def breed_and_sleep(arguments):
        if os.fork() == 0:
            os.setpgid(0, os.getppid())
        note_and_sleep({"note": arguments["note"] + "." + str(os.getpid())})

    def breed_and_return(arguments):
        child = os.fork()
        if child == 0:
            time.sleep(600)
        return {"child": child}, b""

    def spin(arguments):
        signal.setitimer(signal.ITIMER_REAL, 0)
        while True:
            pass

    def die(arguments):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), arguments["signal"])
        time.sleep(600)

    def leave(arguments):
        os._exit(3)

    def swallow(arguments):
        held = []
        while True:
            held.append(bytearray(8 << 20))

    def swallow_and_abort(arguments):
        held = []
        try:
            while True:
                held.append(bytearray(8 << 20))
        except MemoryError:
            os.abort()

    def complain_and_abort(arguments):
        os.write(2, b"memory allocation of 99999 bytes failed\\n")
        os.abort()

    def pour(arguments):
        return {}, bytes(arguments["bytes"])

    def pour_into_file(arguments):
        with open("big", "wb") as file:
            file.write(bytes(arguments["bytes"]))

    def refuse(arguments):
        raise PipelineError(ErrorCode.ENCRYPTED, "needs a password", {"page": 3})

    def fail(arguments):
        raise ZeroDivisionError("by zero")

    def recurse(arguments):
        return recurse(arguments)
"""


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGuard]:
    (tmp_path / "guard_tasks.py").write_text(textwrap.dedent(TASKS), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("UPLOAD_PIPELINE_DATABASE_URL", "postgresql://secret")
    made = ProcessGuard(preload=("guard_tasks",))
    yield made
    made.close()


async def failure(guard: ProcessGuard, task: str, limits: Limits = LIMITS, **arguments: object) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        await guard.run(f"guard_tasks:{task}", arguments, limits)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def notes_in(folder: Path) -> list[Path]:
    return list(folder.glob("note*"))


def tmp_folders(below: str = "*") -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"upload-pipeline-parser-{below}"))


async def works(guard: ProcessGuard) -> None:
    result = await guard.run("guard_tasks:echo", {"n": 1}, LIMITS)
    assert (result.header["n"], result.body) == (1, b"body\n\xff")


async def noted(path: Path) -> int:
    await until(lambda: read(path) != "")
    return int(read(path))


def read(path: Path) -> str:
    return path.read_text(encoding="ascii") if path.exists() else ""


async def test_each_task_has_a_process_of_its_own(guard: ProcessGuard) -> None:
    results = await asyncio.gather(*(guard.run("guard_tasks:echo", {"n": n}, LIMITS) for n in range(8)))
    assert [result.header["n"] for result in results] == list(range(8))
    assert len({result.header["pid"] for result in results} | {os.getpid()}) == 9


async def test_a_task_sees_no_file_and_no_secret_of_ours(guard: ProcessGuard, tmp_path: Path) -> None:
    with (tmp_path / "ours").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        seen = (await guard.run("guard_tasks:surroundings", {}, LIMITS)).header
    assert set(seen["files"]) == {"0", "1", "2", "3"}
    assert seen["files"]["0"] == "/dev/null"
    assert "secret" not in str(seen["environment"])
    assert seen["folder"] == seen["temporary"] != str(Path.cwd())


async def test_what_a_task_leaves_behind_is_removed(guard: ProcessGuard) -> None:
    result = await guard.run("guard_tasks:litter", {}, LIMITS)
    assert Path(result.header["folder"]).parent in tmp_folders()
    assert Path(result.header["folder"]) not in tmp_folders("*/*")
    await asyncio.to_thread(guard.close)
    assert Path(result.header["folder"]).parent not in tmp_folders()


async def test_an_error_of_the_task_comes_back_whole(guard: ProcessGuard) -> None:
    error = await failure(guard, "refuse")
    assert (error.code, error.message, error.details) == (ErrorCode.ENCRYPTED, "needs a password", {"page": 3})


@pytest.mark.parametrize(
    ("task", "arguments", "code", "word"),
    [
        ("fail", {}, ErrorCode.PARSE_FAILED, "ZeroDivisionError: by zero"),
        ("recurse", {}, ErrorCode.PARSE_FAILED, "nested too deeply"),
        ("no_such_function", {}, ErrorCode.PARSE_FAILED, "no_such_function"),
        ("pour", {"bytes": MIB + 1}, ErrorCode.PARSE_FAILED, "too large"),
        ("pour_into_file", {"bytes": 3 * MIB}, ErrorCode.PARSE_FAILED, "File too large"),
        ("swallow", {}, ErrorCode.PARSE_MEMORY, "268,435,456 bytes"),
        ("swallow_and_abort", {}, ErrorCode.PARSE_MEMORY, "268,435,456 bytes"),
        ("complain_and_abort", {}, ErrorCode.PARSE_MEMORY, "268,435,456 bytes"),
        ("die", {"signal": signal.SIGKILL}, ErrorCode.PARSE_MEMORY, "killed from outside"),
        ("die", {"signal": signal.SIGABRT}, ErrorCode.PARSE_CRASHED, "crashed"),
        ("die", {"signal": signal.SIGSEGV}, ErrorCode.PARSE_CRASHED, "crashed"),
        ("die", {"signal": signal.SIGBUS}, ErrorCode.PARSE_CRASHED, "crashed"),
        ("die", {"signal": signal.SIGXCPU}, ErrorCode.PARSE_TIMEOUT, "longer than"),
        ("leave", {}, ErrorCode.PARSE_CRASHED, "crashed"),
    ],
)
async def test_however_a_task_ends_it_has_a_code_and_the_next_one_works(
    guard: ProcessGuard, task: str, arguments: dict[str, object], code: ErrorCode, word: str
) -> None:
    error = await failure(guard, task, **arguments)
    assert error.code is code, error
    assert word in error.message
    await works(guard)


@pytest.mark.parametrize("task", ["spin", "note_and_sleep", "breed_and_sleep"])
async def test_the_deadline_ends_a_task_and_what_it_started(guard: ProcessGuard, tmp_path: Path, task: str) -> None:
    error = await failure(guard, task, Limits(0.5, 64 * MIB, 1000), note=str(tmp_path / "note"))
    assert error.code is ErrorCode.PARSE_TIMEOUT
    assert error.retryable
    notes = notes_in(tmp_path)
    assert len(notes) == {"spin": 0, "note_and_sleep": 1, "breed_and_sleep": 2}[task]
    for note in notes:
        pid = await noted(note)
        await until(lambda pid=pid: not is_running(pid))
    await works(guard)


async def test_a_child_that_a_task_leaves_goes_with_it(guard: ProcessGuard) -> None:
    child = (await guard.run("guard_tasks:breed_and_return", {}, LIMITS)).header["child"]
    await until(lambda: not is_running(child))


async def test_cancelling_the_wait_kills_the_task(guard: ProcessGuard, tmp_path: Path) -> None:
    note = tmp_path / "note"
    waiting = asyncio.create_task(guard.run("guard_tasks:note_and_sleep", {"note": str(note)}, LIMITS))
    pid = await noted(note)
    assert is_running(pid)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: not is_running(pid))
    await works(guard)


async def test_a_task_killed_from_outside_is_told_from_a_timeout(guard: ProcessGuard, tmp_path: Path) -> None:
    note = tmp_path / "note"
    waiting = asyncio.create_task(failure(guard, "note_and_sleep", note=str(note)))
    os.kill(await noted(note), signal.SIGKILL)
    assert (await waiting).code is ErrorCode.PARSE_MEMORY
    await works(guard)


async def test_a_server_that_dies_is_started_again(guard: ProcessGuard, tmp_path: Path) -> None:
    note = tmp_path / "note"
    waiting = asyncio.create_task(failure(guard, "note_and_sleep", note=str(note)))
    pid = await noted(note)
    os.kill(parent_of(pid), signal.SIGKILL)
    error = await waiting
    assert error.code is ErrorCode.INTERNAL
    assert error.retryable
    await until(lambda: not is_running(pid))
    await works(guard)


async def test_a_server_that_cannot_start_is_an_error_of_ours(guard: ProcessGuard) -> None:
    broken = ProcessGuard(preload=("no_such_module",))
    with pytest.raises(PipelineError) as caught:
        await broken.run("guard_tasks:echo", {}, LIMITS)
    assert caught.value.code is ErrorCode.INTERNAL


async def test_closing_ends_all_and_may_be_done_twice(guard: ProcessGuard, tmp_path: Path) -> None:
    note = tmp_path / "note"
    waiting = asyncio.create_task(failure(guard, "note_and_sleep", note=str(note)))
    pid = await noted(note)
    await asyncio.to_thread(guard.close)
    guard.close()
    assert (await waiting).code in (ErrorCode.INTERNAL, ErrorCode.PARSE_MEMORY)
    await until(lambda: not is_running(pid))
    await works(guard)


async def test_a_forgotten_guard_takes_its_server_along(guard: ProcessGuard) -> None:
    other = ProcessGuard(preload=("guard_tasks",))
    before = set(fork_servers_of(os.getpid()))
    await works(other)
    (started,) = set(fork_servers_of(os.getpid())) - before
    del other
    gc.collect()
    assert not is_running(started)


def test_one_guard_serves_one_event_loop_after_another(guard: ProcessGuard) -> None:
    asyncio.run(works(guard))
    asyncio.run(works(guard))


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
async def test_when_the_owner_is_killed_nothing_runs_on(guard: ProcessGuard, tmp_path: Path, way: int) -> None:
    note = tmp_path / "note"
    script = f"""
        import asyncio
        from upload_pipeline.providers.guarded_process import Limits, ProcessGuard
        guard = ProcessGuard(preload=("guard_tasks",))
        asyncio.run(guard.run("guard_tasks:note_and_sleep", {{"note": {str(note)!r}}}, Limits(300, 1 << 28, 1000)))
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])  # noqa: ASYNC220
    try:
        pid = await noted(note)
        server = parent_of(pid)
        owner.send_signal(way)
        owner.wait(20)
        await until(lambda: not is_running(pid) and not is_running(server))
    finally:
        owner.kill()
        owner.wait()


async def test_signals_to_the_whole_group_leave_a_task_to_its_owner(guard: ProcessGuard, tmp_path: Path) -> None:
    note = tmp_path / "note"
    waiting = asyncio.create_task(failure(guard, "note_and_sleep", Limits(1.5, MIB << 8, 1000), note=str(note)))
    pid = await noted(note)
    server = parent_of(pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(server, number)
        os.kill(pid, number)
    assert (await waiting).code is ErrorCode.PARSE_TIMEOUT


@pytest.mark.parametrize("limits", [(0, 1, 1), (float("nan"), 1, 1), (float("inf"), 1, 1), (1, 0, 1), (1, 1, -1)])
def test_limits_that_limit_nothing_are_refused(limits: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Limits(*limits)
