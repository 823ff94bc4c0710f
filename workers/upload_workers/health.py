"""The health endpoint of a worker: is the process alive, can it work, and what has it done?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from upload_pipeline.database.queue import Executor
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_workers.runner import Runner

READY_TIMEOUT = 2.0


@asynccontextmanager
async def health_endpoint(runner: Runner, db: Executor, *, host: str, port: int) -> AsyncGenerator[int]:
    """Serves `/healthz`, `/readyz` and `/metrics` while entered; yields the port.

    `/healthz` is 200 while the event loop turns. `/readyz` is 200 while the worker takes jobs and the database
    answers within two seconds, else 503 with the reason; it names pools that the worker leaves to others, since it
    lacks what their jobs need. `/metrics` is for Prometheus.

    Raises:
        PipelineError: `SETTING_INVALID` where the address cannot be listened on.
    """
    looking: asyncio.Task[Any] | None = None

    async def look() -> None:
        # Whoever asks meanwhile waits for the same look: askers must not take the pool's connections from the jobs.
        nonlocal looking
        if looking is None or looking.done():
            looking = asyncio.create_task(db.fetchval("select 1"))
        shared = looking
        await asyncio.wait({shared}, timeout=READY_TIMEOUT)
        if not shared.done():
            shared.cancel()
        if not shared.done() or shared.cancelled():
            raise TimeoutError(f"no answer within {READY_TIMEOUT:g} s")
        shared.result()

    async def healthz(_request: web.Request) -> web.Response:
        return web.json_response(
            {"status": "ok", "worker_id": str(runner.worker_id), "at_work": runner.at_work, "ended": runner.ended}
        )

    async def readyz(_request: web.Request) -> web.Response:
        if runner.stopping:
            return web.json_response({"status": "stopping"}, status=503)
        try:
            await look()
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer is that we are not ready
            reason = str(error) or type(error).__name__
            return web.json_response({"status": "database unreachable", "reason": reason}, status=503)
        left = {"left_to_others": runner.left_pools} if runner.left_pools else {}
        return web.json_response({"status": "ready", **left})

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(runner.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    server = web.AppRunner(app, access_log=None)
    await server.setup()
    try:
        try:
            await web.TCPSite(server, host, port).start()
        except OSError as error:
            raise PipelineError(
                ErrorCode.SETTING_INVALID,
                f"The health endpoint cannot listen on {host}:{port}: {error.strerror or error}. "
                "Set UPLOAD_PIPELINE_HEALTH_HOST and UPLOAD_PIPELINE_HEALTH_PORT to an address that is free.",
            ) from error
        yield server.addresses[0][1]
    finally:
        if looking is not None:
            looking.cancel()
        await server.cleanup()
