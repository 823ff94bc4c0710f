"""The command `upload-pipeline`: its commands in the order of its help, and what happens to their errors.

Modules of commands import at their top only what their help needs; the rest is imported by the command that runs, so
that `--help` and usage errors come at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from upload_pipeline.cli import (
    access,
    batches,
    database,
    doctor,
    documents,
    failures,
    ingest,
    jobs,
    lanes,
    maintenance,
    migrate,
    models,
    organizations,
    search,
    services,
    storage,
    usage,
)
from upload_pipeline.cli.arguments import examples, json_asked


class Terminal(TyperGroup):
    """The root command: gives every expected error its line and its exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            named = failures.expected(error)
            if named is None:
                raise
            failures.show(named, as_json=json_asked(ctx))
            raise typer.Exit(failures.exit_status(named)) from error


def _show_version(value: bool) -> None:
    if value:
        from upload_pipeline import __version__

        sys.stdout.write(f"upload-pipeline {__version__}\n")
        raise typer.Exit


app = typer.Typer(
    cls=Terminal,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "upload-pipeline ingest ~/Documents/policies --recursive",
        'upload-pipeline search "when is water damage covered"',
        "upload-pipeline doctor",
    ),
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Files in, searchable text out: a document pipeline on Postgres.

    Without any settings everything runs on this machine, in a database that starts by itself.
    """


for _module in (
    ingest,
    search,
    jobs,
    batches,
    documents,
    services,
    access,
    lanes,
    organizations,
    usage,
    models,
    migrate,
    maintenance,
    doctor,
    database,
    storage,
):
    _module.register(app)


def main() -> None:
    """The entry point of the console script."""
    app(prog_name="upload-pipeline")
