"""The health endpoint as a supervisor asks it."""

from __future__ import annotations

import asyncio
import json
import socket
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from probe_world import ProbeWorld, advance, steps_of, until, until_true
from silent_proxy import SilentProxy

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_workers import health
from upload_workers.steps import Advance, Outcome, Snooze, StepContext


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


async def ask(port: int, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, json.loads(await answer.text())


async def test_alive_and_ready(world: ProbeWorld) -> None:
    port = free_port()
    async with world.worker(steps_of(advance), health_port=port) as runner:
        assert await ask(port, "/readyz") == (200, {"status": "ready"})
        status, body = await ask(port, "/healthz")
    assert (status, body["worker_id"], body["at_work"]) == (200, str(runner.worker_id), 0)
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(port, "/healthz")


async def test_it_tells_which_pools_are_left_to_others(world: ProbeWorld) -> None:
    async def lacking() -> bool:
        return True

    async def keyless(job: ClaimedJob, context: StepContext) -> Outcome:
        return Snooze(timedelta(seconds=0), lacking)

    port = free_port()
    await world.enqueue()
    async with world.worker(steps_of(keyless), health_port=port) as runner:
        await until_true(lambda: runner.left_pools, "the pool to be left")
        assert await ask(port, "/readyz") == (200, {"status": "ready", "left_to_others": ["default"]})


async def test_off_by_default(world: ProbeWorld) -> None:
    assert world.settings().health_port == 0


async def test_not_ready_while_it_stops_but_alive(world: ProbeWorld) -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def wait(job: ClaimedJob, context: StepContext) -> Outcome:
        entered.set()
        await go.wait()
        return Advance()

    port = free_port()
    await world.enqueue()

    async def work() -> None:
        async with world.worker(steps_of(wait), health_port=port):
            await entered.wait()

    leaving = asyncio.create_task(work())
    await entered.wait()

    async def stopping() -> bool:
        return await ask(port, "/readyz") == (503, {"status": "stopping"})

    await until(stopping, "the stop")
    status, body = await ask(port, "/healthz")
    assert (status, body["at_work"]) == (200, 1)
    go.set()
    await leaving


async def test_not_ready_while_the_database_is_silent_and_says_so_in_time(
    world: ProbeWorld, proxy: SilentProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "READY_TIMEOUT", 0.3)
    port = free_port()
    async with world.worker(
        steps_of(), url=proxy.url, health_port=port, statement_timeout=1.0, connect_timeout=1.0
    ) as runner:
        proxy.silence()
        # Many askers at once: they must neither wait for a statement's timeout nor take the pool's connections.
        async with asyncio.timeout(3):
            answers = await asyncio.gather(*(ask(port, "/readyz") for _ in range(20)))
        assert {status for status, _ in answers} == {503}
        assert answers[0][1]["status"] == "database unreachable"
        assert (await ask(port, "/healthz"))[0] == 200
        proxy.heal()

        async def ready() -> bool:
            return (await ask(port, "/readyz"))[0] == 200

        await until(ready, "the database", patience=30)
        assert not runner.stopping


async def test_port_that_is_taken_is_named(world: ProbeWorld) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PipelineError, match=str(port)) as caught:
            async with world.worker(steps_of(), health_port=port):
                pass
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert "UPLOAD_PIPELINE_HEALTH_PORT" in caught.value.message
    # and nothing of the worker is left behind
    assert await world.admin.fetchval("select count(*) from upload_pipeline.workers") == 0
