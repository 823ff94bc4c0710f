"""`maintenance`: one round of what workers do by themselves now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from upload_pipeline.cli.arguments import JsonOption, examples

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings
    from upload_workers.upkeep import MaintenanceReport


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("maintenance", epilog=examples("upload-pipeline maintenance", "upload-pipeline maintenance --json"))(
        maintenance_command
    )


AdoptOption = Annotated[
    bool,
    typer.Option(
        "--adopt-store",
        help="Take the store for this database's, whatever its mark says, and remove every file that has no row here.",
    ),
]


def maintenance_command(adopt_store: AdoptOption = False, as_json: JsonOption = False) -> None:
    """Tidy up once: what a crash left in the store, deletions cut short, photos that never came, lost workers.

    Objects without a document are removed once they are older than ORPHAN_GRACE. Exit 1 where that was refused, as the
    store seems to be another database's.
    """
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.cli.failures import FAILED
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import as_object, print_json

    report = run(_maintain(read_settings(), adopt=adopt_store))
    if as_json:
        print_json(as_object(report))
    else:
        _print(report)
    if report.sweep_refused:
        raise typer.Exit(FAILED)


def _print(report: MaintenanceReport) -> None:
    from upload_pipeline.cli.output import print_fields, print_line, size_text

    print_fields(
        [
            ("Orphaned objects removed", f"{report.orphans_removed} ({size_text(report.orphan_bytes)})"),
            ("Unfinished writes removed", report.unfinished_writes_removed),
            ("Deletions finished", report.deletions_finished),
            ("Photos that never came", report.photos_expired),
            ("Sessions removed", f"{report.sessions_removed} ({report.session_documents_removed} documents to delete)"),
            ("Vectors forgotten", report.vectors_forgotten),
            ("Temporary files removed", report.scratch_removed),
            ("Lost workers forgotten", report.workers_forgotten),
            ("Event partitions made", report.partitions_made),
        ]
    )
    if report.sweep_refused:
        print_line(f"\nThe store was not swept: {report.sweep_refused}", style="red")


async def _maintain(settings: Settings, *, adopt: bool) -> MaintenanceReport:
    import asyncio
    from datetime import timedelta

    from upload_pipeline.cli.opening import open_database
    from upload_pipeline.database.connection import connection_options
    from upload_pipeline.database.pools import open_pool
    from upload_pipeline.storage.configured import configured_store
    from upload_workers.upkeep import maintain

    urls = await asyncio.to_thread(open_database, settings)
    db = await open_pool(urls.worker, connection_options(settings, "upload-pipeline maintenance"), size=1)
    try:
        return await maintain(
            db,
            configured_store(settings),
            settings.home / "scratch",
            orphan_grace=timedelta(seconds=settings.orphan_grace),
            session_grace=timedelta(seconds=settings.session_grace),
            cache_life=timedelta(days=settings.embedding_cache_days),
            adopt=adopt,
        )
    finally:
        await db.close()
