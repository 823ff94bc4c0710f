"""A worker put together: connections, store, providers, runner, heartbeat, listener and upkeep."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from uuid import uuid4

import asyncpg
import structlog

import upload_pipeline
from upload_pipeline.database import queue
from upload_pipeline.database.connection import connect, connection_options
from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.garbage import seldom_collected
from upload_pipeline.providers.calls import MeasuredParser, MeasuredPhotoReader, ProviderCalls
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.providers.local_photo_reader import LocalPhotoReader
from upload_pipeline.settings import Settings
from upload_pipeline.storage.configured import configured_store
from upload_pipeline.storage.store import ObjectStore
from upload_pipeline.storage.virus_scan import open_scanner
from upload_workers.bounded import bounded
from upload_workers.detection_desk import open_desk
from upload_workers.health import health_endpoint
from upload_workers.hosted_parse import open_hosted_parser
from upload_workers.leases import LeaseKeeper, heartbeat_connection
from upload_workers.memory import MemoryWatch
from upload_workers.metrics import WorkerMetrics
from upload_workers.models_in_use import ModelsInUse
from upload_workers.pipelines import STEPS
from upload_workers.runner import Runner
from upload_workers.shutdown import on_signals
from upload_workers.steps import Step, StepContext
from upload_workers.upkeep import Upkeep
from upload_workers.wake import AdaptivePoll, wake_listener

log = structlog.get_logger(__name__)

END_TIMEOUT = 2.0
"""Seconds that each part of a stopping worker has to say goodbye; with a dead database it never does."""


@asynccontextmanager
async def running_worker(
    settings: Settings,
    worker_url: str,
    *,
    pools: Sequence[str] | None = None,
    concurrency: int | None = None,
    steps: Mapping[tuple[str, str], Step] = STEPS,
    store: ObjectStore | None = None,
) -> AsyncGenerator[Runner]:
    """A worker at work while entered. Leaving it drains it: steps finish within the grace, the rest is handed back.

    Args:
        worker_url: Postgres as role `upload_worker`.
        pools: which pools to serve; None means the setting.
        concurrency: jobs at once; None means the setting.
        steps: which step leaves which stage.
        store: the object store; None opens the one of the settings.

    Raises:
        PipelineError: the database or a provider cannot be opened, or the store cannot be opened or written.
    """
    pools = tuple(pools or settings.worker_pools)
    concurrency = concurrency or settings.worker_concurrency
    scratch = settings.home / "scratch"
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        options = connection_options(settings, "upload-pipeline worker")
        db = await open_pool(worker_url, options, size=settings.pool_size)
        stack.push_async_callback(_close_pool, db)
        store = store or configured_store(settings)
        await store.check_writable()
        calls = ProviderCalls()
        models = ModelsInUse(db, calls, settings)
        stack.push_async_callback(models.close)
        hosted_parser = open_hosted_parser(db, calls, settings)
        if hosted_parser is not None:
            stack.push_async_callback(hosted_parser.close)
        local_parser = LocalParser(settings.parse_timeout, settings.parse_memory_bytes)
        stack.callback(local_parser.close)
        parser = MeasuredParser(local_parser, calls)
        local_photos = LocalPhotoReader(settings.parse_timeout, settings.parse_memory_bytes, settings.max_photo_pixels)
        stack.callback(local_photos.close)
        desk = open_desk(db, calls, settings)
        stack.push_async_callback(desk.close)
        await models.start()
        worker_id = uuid4()
        keeper = LeaseKeeper(
            worker_id,
            partial(heartbeat_connection, worker_url, options, settings.heartbeat_interval),
            ttl=settings.lease_ttl,
            interval=settings.heartbeat_interval,
            step_timeout=settings.stage_timeout,
        )
        runner = Runner(
            worker_id,
            db,
            StepContext(
                db,
                store,
                parser,
                models,
                settings,
                scratch,
                open_scanner(settings.clamd_url, seconds=settings.clamd_timeout),
                MeasuredPhotoReader(local_photos, calls),
                hosted_parser,
                desk,
            ),
            steps,
            await queue.load_steps(db),
            keeper,
            pools,
            concurrency,
            lease_ttl=settings.lease_ttl,
            group_window=settings.group_window,
            poll=AdaptivePoll(settings.poll_min, settings.poll_max),
            metrics=WorkerMetrics(calls),
        )
        runner.metrics.show_held(lambda: runner.at_work)
        runner.metrics.show_left(lambda: len(runner.left_pools))
        memory = MemoryWatch(settings.worker_memory_bytes, freed=runner.wake.set)
        runner.has_room = lambda: not memory.over
        await queue.register_worker(
            db,
            worker_id=worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=upload_pipeline.__version__,
            pools=pools,
            concurrency=concurrency,
        )
        stack.push_async_callback(_sign_off, db, runner)
        upkeep = Upkeep(
            db,
            store,
            scratch,
            lease_ttl=settings.lease_ttl,
            maintenance_interval=settings.maintenance_interval,
            orphan_grace=settings.orphan_grace,
            session_grace=settings.session_grace,
            sweep_interval=settings.sweep_interval,
            cache_life=timedelta(days=settings.embedding_cache_days),
            wake=runner.wake.set,
            account=None if hosted_parser is None else hosted_parser.accounts.settle,
        )
        beside = [asyncio.create_task(upkeep.run(), name="upkeep")]
        if settings.worker_memory_bytes:
            await memory.look()
            beside.append(asyncio.create_task(memory.run(), name="memory"))
        if not settings.transaction_pooler:
            listener = wake_listener(partial(connect, worker_url, options), pools, runner.wake)
            beside.append(asyncio.create_task(listener.run(), name="listener"))
        stack.push_async_callback(_end, beside)
        keeper.start(asyncio.get_running_loop())
        stack.push_async_callback(asyncio.to_thread, keeper.stop)
        if settings.health_port:
            await stack.enter_async_context(
                health_endpoint(runner, db, host=settings.health_host, port=settings.health_port)
            )
        stack.enter_context(seldom_collected())
        log.info("worker_started", worker_id=str(worker_id), pools=pools, concurrency=concurrency)
        runner.start()
        stack.push_async_callback(_drain, runner, models, settings.shutdown_grace)
        yield runner


async def _drain(runner: Runner, models: ModelsInUse, grace: float) -> None:
    models.send_no_more()
    await runner.drain(grace)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=END_TIMEOUT)


async def _close_pool(pool: BoundedPool) -> None:
    try:
        await bounded(pool.close(), END_TIMEOUT)
    except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        pool.terminate()


async def _sign_off(db: queue.Executor, runner: Runner) -> None:
    try:
        await bounded(queue.unregister_worker(db, worker_id=runner.worker_id), END_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - the register is a report; a silent worker is forgotten in time
        log.warning("sign_off_failed", error=str(error) or type(error).__name__)
    log.info("worker_stopped", worker_id=str(runner.worker_id), claimed=runner.claimed, ended=runner.ended)


async def work_until_stopped(
    settings: Settings,
    worker_url: str,
    *,
    pools: Sequence[str] | None = None,
    concurrency: int | None = None,
    steps: Mapping[tuple[str, str], Step] = STEPS,
) -> None:
    """A worker process: works until TERM or INT, and then ends by the shutdown deadline whatever happens."""
    stopped = asyncio.Event()
    with on_signals(asyncio.get_running_loop(), stopped.set, deadline=settings.shutdown_deadline):
        async with running_worker(settings, worker_url, pools=pools, concurrency=concurrency, steps=steps):
            await stopped.wait()
