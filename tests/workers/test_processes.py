"""Worker processes that are stopped, suspended, killed and cut off."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from probe_world import FAST, PATIENCE, ProbeWorld, environment_of, steps_of, until
from silent_proxy import SilentProxy

from upload_workers.shutdown import FORCED_EXIT

HERE = Path(__file__).parent
OTHER_HANGS = ("wait", "deaf", "thread")


class Process:
    """A worker process: with a step of `probe_worker`, or `python -m upload_workers` where that is empty."""

    def __init__(self, world: ProbeWorld, step: str, url: str | None, settings: dict[str, object]) -> None:
        command = [str(HERE / "probe_worker.py"), step] if step else ["-m", "upload_workers"]
        given = {**FAST, "home": world.home, "database_url": url or world.worker_url, "log_format": "json", **settings}
        self.log = world.home / f"{step}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env=environment_of(given),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def next_step(self) -> tuple[UUID, int]:
        """Job and token of the next step that begins; waits for it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the worker ended: {self.log.read_text()}"
        job, token = line.split()
        return UUID(job), int(token)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status; fails where it still runs after so long."""
        return self._process.wait(seconds)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        if self.runs:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


Start = Callable[..., Process]


@pytest.fixture
def start(world: ProbeWorld) -> Iterator[Start]:
    """Starts probe workers; they are gone at the end of the test."""
    started: list[Process] = []

    def begin(step: str, *, url: str | None = None, **settings: object) -> Process:
        started.append(Process(world, step, url, settings))
        return started[-1]

    yield begin
    for process in started:
        process.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
async def test_first_signal_lets_steps_finish_and_hands_back_the_rest(
    world: ProbeWorld, start: Start, number: signal.Signals
) -> None:
    (job_id,) = await world.enqueue()
    process = start("nap")
    process.next_step()
    process.send(number)
    assert process.wait() == 0
    job = await world.job(job_id)
    assert (job["stage"], job["state"], job["retry_count"]) == ("second", "queued", 0)
    assert await world.admin.fetchval("select count(*) from upload_pipeline.workers") == 0


async def test_first_signal_cuts_off_what_does_not_finish_and_counts_no_retry(world: ProbeWorld, start: Start) -> None:
    (job_id,) = await world.enqueue()
    process = start("wait", shutdown_grace=0.2)
    process.next_step()
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    job = await world.job(job_id)
    assert (job["stage"], job["state"], job["retry_count"]) == ("first", "queued", 0)


@pytest.mark.parametrize("step", ["spin", *(pytest.param(step, marks=pytest.mark.slow) for step in OTHER_HANGS)])
async def test_second_signal_ends_the_process_at_once(world: ProbeWorld, start: Start, step: str) -> None:
    (job_id,) = await world.enqueue()
    process = start(step, shutdown_grace=600.0, shutdown_deadline=600.0)
    process.next_step()
    process.send(signal.SIGTERM)
    await asyncio.sleep(0.3)  # two that come at once are one to the system
    assert process.runs
    process.send(signal.SIGTERM)
    assert process.wait() == FORCED_EXIT
    assert (await world.job(job_id))["state"] == "working"  # its lease runs out


@pytest.mark.parametrize("step", ["spin", *(pytest.param(step, marks=pytest.mark.slow) for step in OTHER_HANGS)])
async def test_deadline_ends_a_process_whose_step_never_does(world: ProbeWorld, start: Start, step: str) -> None:
    await world.enqueue()
    process = start(step, shutdown_grace=0.1, shutdown_deadline=1.0)
    process.next_step()
    process.send(signal.SIGTERM)
    assert process.wait() in (0, FORCED_EXIT)
    assert not process.runs


@pytest.mark.parametrize("step", ["wait", pytest.param("nap", marks=pytest.mark.slow)])
async def test_process_with_a_dead_database_socket_ends_by_its_deadline(
    world: ProbeWorld, proxy: SilentProxy, start: Start, step: str
) -> None:
    await world.enqueue()
    process = start(
        step, url=proxy.url, shutdown_grace=0.5, shutdown_deadline=2.0, statement_timeout=600, connect_timeout=600
    )
    process.next_step()
    proxy.silence()
    process.send(signal.SIGTERM)
    assert process.wait() in (0, FORCED_EXIT)


async def test_signal_during_the_start_ends_the_process(world: ProbeWorld, proxy: SilentProxy, start: Start) -> None:
    proxy.silence()
    process = start("quick", url=proxy.url, connect_timeout=600, shutdown_grace=0.1, shutdown_deadline=0.5)
    while not proxy.accepted:
        assert process.runs
        await asyncio.sleep(0.02)
    process.send(signal.SIGTERM)
    assert process.wait() == FORCED_EXIT


async def test_zombie_writes_nothing_and_goes_on_with_other_work(world: ProbeWorld, start: Start) -> None:
    await world.retry_soon()
    (job_id,) = await world.enqueue()
    zombie = start("nap", lease_ttl=1.0, worker_concurrency=1)
    assert zombie.next_step() == (job_id, 1)
    zombie.send(signal.SIGSTOP)
    async with world.worker(steps_of(), lease_ttl=2.0):
        ended = await world.until_state(job_id, "done")
    history = await world.events(job_id)
    assert "job_reaped" in history
    zombie.send(signal.SIGCONT)
    (other,) = await world.enqueue()
    assert zombie.next_step()[0] == other
    await world.until_state(other, "done")
    assert await world.job(job_id) == ended
    assert await world.events(job_id) == history
    zombie.send(signal.SIGTERM)
    assert zombie.wait() == 0


@pytest.mark.slow
async def test_zombie_whose_job_is_at_work_elsewhere_leaves_it_alone(world: ProbeWorld, start: Start) -> None:
    await world.retry_soon()
    (job_id,) = await world.enqueue()
    zombie = start("nap", lease_ttl=1.0)
    zombie.next_step()
    zombie.send(signal.SIGSTOP)
    owner = start("wait", lease_ttl=4.0)
    assert owner.next_step()[0] == job_id
    held = await world.job(job_id)
    zombie.send(signal.SIGCONT)
    await asyncio.sleep(1.5)
    now = await world.job(job_id)
    assert (now["lease_token"], now["worker_id"], now["stage"], now["state"]) == (
        held["lease_token"],
        held["worker_id"],
        "first",
        "working",
    )
    assert zombie.runs


@pytest.mark.slow
async def test_killed_worker_costs_one_retry_and_another_goes_on_at_the_same_stage(
    world: ProbeWorld, start: Start
) -> None:
    await world.retry_soon()
    (job_id,) = await world.enqueue()
    victim = start("wait", lease_ttl=1.0)
    victim.next_step()
    victim.send(signal.SIGKILL)
    victim.wait()
    async with world.worker(steps_of()):
        await world.until_state(job_id, "done")
    history = await world.events(job_id)
    assert history[:3] == ["job_enqueued", "job_claimed", "job_reaped"]


def _run(environment: dict[str, object], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "upload_workers"],
        env=environment_of(environment),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        check=False,
    )


def test_module_refuses_a_bad_setting_with_one_line(tmp_path: Path) -> None:
    ended = _run({"home": tmp_path, "lease_ttl": "soon"}, cwd=tmp_path)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "UPLOAD_PIPELINE_LEASE_TTL" in line
    assert "soon" in line


def test_module_says_in_one_line_that_there_is_no_database_and_shows_no_password(tmp_path: Path) -> None:
    url = f"postgresql://upload_worker:geheim@/x?host={tmp_path}"
    ended = _run({"home": tmp_path, "database_url": url, "connect_timeout": 1}, cwd=tmp_path)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "DATABASE_UNAVAILABLE" in line
    assert "geheim" not in ended.stderr


def test_module_says_in_one_line_that_its_health_port_is_taken(world: ProbeWorld, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = _run({**FAST, "home": tmp_path, "database_url": world.worker_url, "health_port": port}, cwd=tmp_path)
    assert ended.returncode == 2
    assert "UPLOAD_PIPELINE_HEALTH_PORT" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_module_does_not_load_the_terminal() -> None:
    code = "import sys, upload_workers.__main__; print('typer' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"


async def test_module_works_until_it_is_told_to_stop(world: ProbeWorld, start: Start) -> None:
    process = start("")

    async def registered() -> bool:
        pids = await world.admin.fetch("select pid from upload_pipeline.workers")
        return [row["pid"] for row in pids] == [process.pid]

    await until(registered, "the worker in the register")
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert await world.admin.fetchval("select count(*) from upload_pipeline.workers") == 0
