"""`migrate`: brings the database to the schema of this version."""

from __future__ import annotations

from typing import Annotated

import typer

from upload_pipeline.cli.arguments import JsonOption, examples


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "migrate",
        epilog=examples(
            "upload-pipeline migrate",
            "upload-pipeline migrate --check",
            "UPLOAD_PIPELINE_MIGRATION_DATABASE_URL=postgresql://postgres@db/app upload-pipeline migrate",
        ),
    )(migrate_command)


def migrate_command(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 where migrations are pending.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Apply the migrations that the database lacks. Any number of processes may do so at once."""
    from upload_pipeline.cli.failures import FAILED
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import print_json, print_line, seconds_text
    from upload_pipeline.database.connection import describe_url
    from upload_pipeline.database.migrations import apply_migrations, pending_migrations
    from upload_pipeline.database.urls import resolve_database

    urls = resolve_database(read_settings())
    if check:
        pending = pending_migrations(urls.admin)
        if as_json:
            print_json({"pending": [migration.version for migration in pending]})
        elif pending:
            for migration in pending:
                print_line(f"pending  {migration.file_name}")
        else:
            print_line(f"{describe_url(urls.admin)} is up to date.")
        raise typer.Exit(FAILED if pending else 0)
    applied = apply_migrations(urls.admin)
    if as_json:
        print_json({"applied": applied})
        return
    for done in applied:
        print_line(f"applied  {done.version}_{done.name}  {seconds_text(done.seconds)}")
    if not applied:
        print_line(f"{describe_url(urls.admin)} is up to date.")
