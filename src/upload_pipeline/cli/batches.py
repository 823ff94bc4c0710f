"""`batch`: how far a batch is, and what failed of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from upload_pipeline.cli.arguments import JsonOption, examples

if TYPE_CHECKING:
    from upload_pipeline.database.batches import BatchStatus

STYLES = {"completed": "green", "in_progress": "cyan", "partial_failure": "yellow", "failed": "red"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("batch", epilog=examples("upload-pipeline batch 0192f0c4-6a1e-7b11-9c55-2f4d7c9a1b30"))(show_command)


def show_command(
    batch: Annotated[
        UUID, typer.Argument(metavar="BATCH_ID", help="Id of the batch, as `ingest` tells it.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Show how far a batch is, and which of its files failed."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import as_object, print_json
    from upload_pipeline.database.listings import find_batch
    from upload_pipeline.errors import ErrorCode, PipelineError

    with reading_database() as connection:
        found = find_batch(connection, batch)
    if found is None:
        raise PipelineError(
            ErrorCode.BATCH_NOT_FOUND, f"There is no batch {batch}. `upload-pipeline ingest` tells the id of each."
        )
    if as_json:
        # What is estimated is the caller's of the HTTP service.
        print_json({name: value for name, value in as_object(found).items() if name != "estimated_completion_at"})
    else:
        print_batch(found)


def print_batch(batch: BatchStatus) -> None:
    """A batch for a person to read."""
    from rich.text import Text

    from upload_pipeline.cli.output import print_fields, print_table, seconds_text, table

    counts = ((batch.processed, "processed"), (batch.failed, "failed"), (batch.open, "open"))
    print_fields(
        [
            ("Batch", batch.batch_id),
            ("Status", Text(batch.status, style=STYLES.get(batch.status, ""))),
            ("Files", f"{batch.total:,}: " + ", ".join(f"{count:,} {word}" for count, word in counts if count)),
            ("Took" if batch.completed_at else "So far", seconds_text(batch.seconds)),
            *(("Warning", warning) for warning in batch.warnings),
        ]
    )
    if batch.failed_members:
        rows = ((failed.filename, failed.code, failed.error) for failed in batch.failed_members)
        print_table(table(("FAILED FILE", "CODE", "WHY"), rows, spare=("WHY",)))
