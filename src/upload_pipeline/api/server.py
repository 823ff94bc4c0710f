"""The service on its socket: started only where it can work, stopped so that open requests end as they should."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
import uvicorn

from upload_pipeline.api.app import create_app
from upload_pipeline.api.resources import Resources, open_resources
from upload_pipeline.database.job_watches import forget_lost_watches
from upload_pipeline.database.migration_state import require_migrations
from upload_pipeline.database.queue import Executor
from upload_pipeline.database.rate_limits import forget_full_buckets
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.garbage import seldom_collected
from upload_pipeline.settings import Settings

log = structlog.get_logger(__name__)

HOUSEKEEPING_SECONDS = 300.0
"""Between two removals of buckets that are full again, and of what processes that were killed watched."""

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 65  # longer than the 60 s of usual load balancers, so that they and not we close idle connections


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that answers.

    Attributes:
        url: of its root, as this machine reaches it.
        failed: done where it ended by itself; its exception is why.
    """

    url: str
    failed: asyncio.Future[None]


class _Server(uvicorn.Server):
    """Uvicorn without its handlers of signals: who runs the service stops it."""

    def __init__(self, config: uvicorn.Config, resources: Resources) -> None:
        super().__init__(config)
        self._resources = resources
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Streams of events would never end by themselves; their clients come back elsewhere and resume.
        self._resources.job_feed.close()
        await super().shutdown(sockets)


@asynccontextmanager
async def running_service(settings: Settings, database_url: str) -> AsyncGenerator[RunningService]:
    """Serves while entered. Leaving it takes no new requests and gives open ones `API_SHUTDOWN_GRACE` seconds.

    Args:
        settings: of this process.
        database_url: Postgres as role `upload_worker`.

    Raises:
        PipelineError: `SETTING_INVALID` where the address cannot be listened on; `MIGRATIONS_PENDING`;
            `DATABASE_UNAVAILABLE`; `STORAGE_UNAVAILABLE` or `STORAGE_DENIED` where the store cannot be written.
    """
    async with AsyncExitStack() as stack:
        listening = stack.enter_context(_listen(settings.api_host, settings.api_port))
        resources = await stack.enter_async_context(open_resources(settings, database_url))
        await require_migrations(resources.db)
        await resources.store.check_writable()
        app = create_app(settings, resources)
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=round(settings.api_shutdown_grace),
            ),
            resources,
        )
        housekeeping = asyncio.create_task(_keep_house(resources.db), name="housekeeping")
        stack.callback(housekeeping.cancel)
        serving = asyncio.create_task(server.serve([listening]), name="server")
        stack.push_async_callback(_stop, server, serving)
        host, port = listening.getsockname()[:2]
        service = RunningService(f"http://{f'[{host}]' if ':' in host else host}:{port}", serving)
        await asyncio.wait([serving, stack.enter_context(_waiting(server.ready))], return_when=asyncio.FIRST_COMPLETED)
        stack.enter_context(seldom_collected())
        log.info("service_started", url=service.url)
        yield service
    log.info("service_stopped")


@contextlib.contextmanager
def _waiting(event: asyncio.Event) -> Generator[asyncio.Task[bool]]:
    task = asyncio.create_task(event.wait())
    try:
        yield task
    finally:
        task.cancel()


async def _stop(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await serving


@contextlib.contextmanager
def _listen(host: str, port: int) -> Generator[socket.socket]:
    """A socket that listens; taken before anything else, so that a second service on the address starts nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"The service cannot listen on {host}:{port}: {error.strerror or error}. Set UPLOAD_PIPELINE_API_HOST and "
            "UPLOAD_PIPELINE_API_PORT to an address that is free.",
        ) from error
    with listening:
        yield listening


async def _keep_house(db: Executor) -> None:
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        try:
            await forget_full_buckets(db)
            await forget_lost_watches(db)
        except Exception as error:  # noqa: BLE001 - it is tried again, and nothing waits for it
            log.warning("housekeeping_failed", error=str(error) or type(error).__name__)
