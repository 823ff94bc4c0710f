"""`worker`, `serve` and `up`: what keeps running."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upload_pipeline.cli.arguments import examples

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

HostOption = Annotated[
    str | None,
    typer.Option("--host", metavar="HOST", help="Address of the API. Default: API_HOST.", show_default=False),
]
PortOption = Annotated[
    int | None,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        metavar="PORT",
        help="Its port; 0 takes a free one. Default: API_PORT.",
        show_default=False,
    ),
]

PoolOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pool", metavar="P", help="A pool to serve; repeat it for more. Default: WORKER_POOLS.", show_default=False
    ),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        min=1,
        max=1000,
        metavar="N",
        help="Jobs at once. Default: WORKER_CONCURRENCY.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        "worker",
        epilog=examples(
            "upload-pipeline worker", "upload-pipeline worker --pool parsing --pool embedding --concurrency 8"
        ),
    )(worker_command)
    app.command(
        "serve",
        epilog=examples("upload-pipeline serve", "upload-pipeline serve --host 0.0.0.0 --port 8080"),
    )(serve_command)
    app.command(
        "up",
        epilog=examples("upload-pipeline up", "upload-pipeline up --port 8080 --concurrency 2"),
    )(up_command)


def worker_command(pool: PoolOption = None, concurrency: ConcurrencyOption = None) -> None:
    """Work on jobs until TERM or Ctrl-C; running steps then finish, and the rest is handed back."""
    from upload_pipeline.cli.opening import open_database, read_settings

    settings = read_settings()
    urls = open_database(settings)
    _work(settings, urls.worker, pools=pool, concurrency=concurrency)


def serve_command(host: HostOption = None, port: PortOption = None) -> None:
    """Serve the HTTP API until TERM or Ctrl-C; open requests then finish. Exit 2 where it cannot start."""
    from upload_pipeline.cli.opening import open_database

    with _refused_start():
        settings = _service_settings(host, port)
        urls = open_database(settings)
    _run_service(settings, urls.worker, concurrency=None, work=False)


def up_command(concurrency: ConcurrencyOption = None, host: HostOption = None, port: PortOption = None) -> None:
    """Start everything in the foreground: database, migrations, HTTP API, worker. TERM or Ctrl-C ends it.

    A database that was running before keeps running.
    """
    from upload_pipeline.cli.opening import open_database
    from upload_pipeline.cli.output import note
    from upload_pipeline.database.connection import describe_url
    from upload_pipeline.database.embedded import embedded_status, stop_embedded

    with _refused_start():
        settings = _service_settings(host, port)
    started_here = settings.embedded and embedded_status(settings.home).pid is None
    try:
        with _refused_start():
            urls = open_database(settings)
        note(f"{describe_url(urls.worker)}; files in {_without_secrets(settings)}. Ctrl-C stops.")
        _run_service(settings, urls.worker, concurrency=concurrency, work=True)
    finally:
        if started_here:
            stop_embedded(settings.home)


def _service_settings(host: str | None, port: int | None) -> Settings:
    from upload_pipeline.settings import load_settings

    given = {"api_host": host, "api_port": port}
    return load_settings(**{name: value for name, value in given.items() if value is not None})


@contextmanager
def _refused_start() -> Generator[None]:
    """Ends the command with exit status 2 and the reason where what the service stands on is not there."""
    from upload_pipeline.cli.failures import USAGE, expected, show

    try:
        yield
    except Exception as error:
        named = expected(error)
        if named is None:
            raise
        show(named, as_json=False)
        raise typer.Exit(USAGE) from error


def _run_service(settings: Settings, url: str, *, concurrency: int | None, work: bool) -> None:
    from upload_pipeline.cli.event_loop import run

    _begin_logs(settings)
    run(_serve_until_stopped(settings, url, concurrency=concurrency, work=work))


async def _serve_until_stopped(settings: Settings, url: str, *, concurrency: int | None, work: bool) -> None:
    import asyncio

    from upload_pipeline.api.development_tokens import is_exposed
    from upload_pipeline.api.server import running_service
    from upload_pipeline.cli.output import note
    from upload_workers.process import running_worker
    from upload_workers.shutdown import on_signals

    stopped = asyncio.Event()
    deadline = settings.api_shutdown_grace + settings.shutdown_deadline
    with on_signals(asyncio.get_running_loop(), stopped.set, deadline=deadline):
        async with AsyncExitStack() as stack:
            with _refused_start():
                if work:
                    await stack.enter_async_context(running_worker(settings, url, concurrency=concurrency))
                service = await stack.enter_async_context(running_service(settings, url))
            note(f"API at {service.url}, its documentation at {service.url}/docs")
            if is_exposed(settings):
                note(
                    f"WARNING: {settings.api_host} can be reached from elsewhere, and the tokens that are accepted are "
                    "those for development. Set UPLOAD_PIPELINE_JWT_ISSUER, or UPLOAD_PIPELINE_API_HOST=127.0.0.1."
                )
            stopping = asyncio.create_task(stopped.wait())
            waiting: list[asyncio.Future[Any]] = [stopping, service.failed]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()


def _work(settings: Settings, url: str, *, pools: list[str] | None, concurrency: int | None) -> None:
    from upload_pipeline.cli.event_loop import run
    from upload_workers.process import work_until_stopped

    _begin_logs(settings)
    run(work_until_stopped(settings, url, pools=pools, concurrency=concurrency))


def _begin_logs(settings: Settings) -> None:
    import structlog

    from upload_pipeline.cli.unknown_settings import unknown_settings
    from upload_pipeline.logs import configure_logs

    configure_logs(settings)
    for line in unknown_settings():
        structlog.get_logger(__name__).warning("unknown_setting", problem=line)


def _without_secrets(settings: Settings) -> str:
    from upload_pipeline.url_secrets import without_password

    return without_password(settings.effective_storage_url)
