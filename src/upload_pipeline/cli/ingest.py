"""`ingest`: files in, and a worker beside it until all of them are searchable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upload_pipeline.cli.arguments import JsonOption, UserOption, examples

if TYPE_CHECKING:
    from upload_pipeline.cli.ingestion import Ingestion


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "ingest",
        epilog=examples(
            "upload-pipeline ingest policy.pdf notes.docx",
            "upload-pipeline ingest ~/Documents/policies --recursive",
            "upload-pipeline ingest claims/ --metadata department=claims --metadata year=2026",
            "upload-pipeline ingest claims/ --metadata metadata.csv",
            "upload-pipeline ingest claims/ --json > report.jsonl",
        ),
    )(ingest_command)


def ingest_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Files, and folders for the files in them.", show_default=False),
    ],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Also take what lies in folders of folders.")
    ] = False,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata",
            metavar="K=V|FILE",
            help="Kept with each file, to filter by; repeat it. A FILE, CSV or JSON, tells it for each file by name.",
            show_default=False,
        ),
    ] = None,
    user: UserOption = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Take the files in, and leave the work to a worker.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take files in and process them until they can be found. PDF, DOCX, HTML, Markdown and text.

    The same file again is not processed twice. Ctrl-C stops cleanly: the same command goes on where it stopped.
    Hidden files in folders are left out. With a FILE of metadata the files are one batch, of 100 at most.
    Exit 0: all done; 1: some failed; 2: wrong usage.
    """
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.cli.failures import FAILED, INTERRUPTED
    from upload_pipeline.cli.ingest_display import open_display
    from upload_pipeline.cli.ingestion import Request, ingest
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.sources import expand
    from upload_pipeline.ids import LOCAL_USER_ID
    from upload_pipeline.intake.metadata import check_metadata
    from upload_pipeline.logs import configure_logs

    mapping, pairs = _mapping(metadata or [])
    kept = check_metadata(_metadata(pairs))
    try:
        files = expand(paths, recursive=recursive)
    except OSError as error:
        raise typer.BadParameter(f"{error.filename!r} cannot be read: {error.strerror}.", param_hint="PATH") from error
    if mapping is not None:
        files = [file for file in files if not file.exists() or not file.samefile(mapping)]
    if not files:
        hint = "" if recursive else " Add --recursive to look into the folders in it."
        raise typer.BadParameter(f"There are no files in {', '.join(map(str, paths))}.{hint}", param_hint="PATH")
    request = Request(files, user or LOCAL_USER_ID, kept, wait=not no_wait, mapping=mapping)
    settings = read_settings()
    with open_display(as_json=as_json) as display:
        # Within the display, so that log lines go above it. What fails shows with its file already.
        level = settings.log_level if "log_level" in settings.model_fields_set else "error"
        configure_logs(settings.model_copy(update={"log_level": level}))
        outcome = run(ingest(settings, request, display))
    _close(outcome, as_json=as_json, waited=not no_wait)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if outcome.failed:
        raise typer.Exit(FAILED)


def _mapping(given: list[str]) -> tuple[Path | None, list[str]]:
    """The file among what `--metadata` was given, and the rest. What has no = names a file."""
    files = [Path(one).expanduser() for one in given if "=" not in one and Path(one).expanduser().is_file()]
    if len(files) > 1:
        raise typer.BadParameter("There is more than one file of metadata.", param_hint="--metadata")
    pairs = [one for one in given if "=" in one or not Path(one).expanduser().is_file()]
    return (files[0] if files else None), pairs


def _metadata(pairs: list[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(
                f"{pair!r} is not of the form K=V, and there is no such file.", param_hint="--metadata"
            )
        if key in values:
            raise typer.BadParameter(f"{key!r} is given twice.", param_hint="--metadata")
        values[key] = value
    return values


def _close(outcome: Ingestion, *, as_json: bool, waited: bool) -> None:
    """The last lines: what it came to, and how to go on."""
    from upload_pipeline.cli.output import counted, note, print_line, seconds_text

    if outcome.interrupted:
        note(
            f"Stopped with {counted(outcome.open_count, 'file')} not done. Nothing is lost: the same command, or "
            "`upload-pipeline worker`, goes on where this stopped."
        )
        return
    if as_json:
        return
    parts = [counted(outcome.total, "file")]
    for count, word in (
        (outcome.done, "done"),
        (outcome.queued, "queued"),
        (outcome.duplicates, "known before"),
        (outcome.failed, "failed"),
    ):
        if count:
            parts.append(f"{count:,} {word}")
    parts += [counted(outcome.chunks, "chunk")] if outcome.chunks else []
    print_line(f"{', '.join(parts)} in {seconds_text(outcome.seconds)}.", style="bold")
    if outcome.batch_id is not None:
        note(f"This was batch {outcome.batch_id}; `upload-pipeline batch {outcome.batch_id}` shows it.")
    if not waited and outcome.queued:
        note("`upload-pipeline worker` processes what is queued; `upload-pipeline jobs` shows how far it is.")
    elif outcome.done:
        note('Now try: upload-pipeline search "…"')
