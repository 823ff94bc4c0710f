"""`worker` and `up`: what keeps running."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from upload_pipeline.cli.arguments import examples

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

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
    app.command("up", epilog=examples("upload-pipeline up", "UPLOAD_PIPELINE_HEALTH_PORT=8081 upload-pipeline up"))(
        up_command
    )


def worker_command(pool: PoolOption = None, concurrency: ConcurrencyOption = None) -> None:
    """Work on jobs until TERM or Ctrl-C; running steps then finish, and the rest is handed back."""
    from upload_pipeline.cli.opening import open_database, read_settings

    settings = read_settings()
    urls = open_database(settings)
    _work(settings, urls.worker, pools=pool, concurrency=concurrency)


def up_command(concurrency: ConcurrencyOption = None) -> None:
    """Start everything in the foreground: database, migrations, worker. TERM or Ctrl-C ends it.

    A database that was running before keeps running.
    """
    from upload_pipeline.cli.opening import open_database, read_settings
    from upload_pipeline.cli.output import note
    from upload_pipeline.database.connection import describe_url
    from upload_pipeline.database.embedded import embedded_status, stop_embedded

    settings = read_settings()
    started_here = settings.embedded and embedded_status(settings.home).pid is None
    try:
        urls = open_database(settings)
        note(f"{describe_url(urls.worker)}; files in {_without_secrets(settings)}. Ctrl-C stops.")
        _work(settings, urls.worker, pools=None, concurrency=concurrency)
    finally:
        if started_here:
            stop_embedded(settings.home)


def _work(settings: Settings, url: str, *, pools: list[str] | None, concurrency: int | None) -> None:
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.logs import configure_logs
    from upload_workers.process import work_until_stopped

    configure_logs(settings)
    run(work_until_stopped(settings, url, pools=pools, concurrency=concurrency))


def _without_secrets(settings: Settings) -> str:
    from upload_pipeline.cli.shown_settings import without_password

    return without_password(settings.effective_storage_url)
