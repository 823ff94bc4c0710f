"""`jobs`, `job`, `retry`, `cancel`: what is under way, what became of it, and what an operator may do about it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upload_pipeline.cli.arguments import JobArgument, JsonOption, LimitOption, OnlyUserOption, examples
from upload_pipeline.stages import JobState

if TYPE_CHECKING:
    from uuid import UUID

    from psycopg import Connection
    from rich.text import Text

    from upload_pipeline.database.listings import EventListing, JobListing

EVENT_LIMIT = 1000
_FAILED = ("deadletter", "retryable", "cancelled")

State = StrEnum("State", {state.name: state.value for state in JobState})  # type: ignore[misc]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        "jobs",
        epilog=examples(
            "upload-pipeline jobs", "upload-pipeline jobs --state deadletter", "upload-pipeline jobs --json"
        ),
    )(list_command)
    app.command("job", epilog=examples("upload-pipeline job 6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"))(show_command)
    app.command(
        "retry",
        epilog=examples(
            "upload-pipeline retry 6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11",
            "upload-pipeline retry 6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11 --from-stage chunking",
        ),
    )(retry_command)
    app.command("cancel", epilog=examples("upload-pipeline cancel 6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"))(
        cancel_command
    )


def list_command(
    state: Annotated[State | None, typer.Option("--state", help="Only jobs in this state.", show_default=False)] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            metavar="P",
            help="Only jobs of this pipeline. Default: all but `reembed`.",
            show_default=False,
        ),
    ] = None,
    user: OnlyUserOption = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json
    from upload_pipeline.database.listings import list_jobs

    with reading_database() as connection:
        # One more than asked for tells whether there are more.
        found = list_jobs(
            connection, state=state.value if state else None, user_id=user, pipeline=pipeline, limit=limit + 1
        )
    if as_json:
        for job in found[:limit]:
            print_json(job_object(job))
    elif found:
        _print_jobs(found[:limit])
    else:
        note("No jobs." if state is None else f"No jobs in state {state.value}.")
    if len(found) > limit:
        note(f"These are the newest {limit}. There are more: --limit shows them.")


def show_command(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show one job with its history."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json
    from upload_pipeline.database.listings import list_events

    with reading_database() as connection:
        found = _find(connection, job)
        events = list_events(connection, job, limit=EVENT_LIMIT)
    if as_json:
        print_json({**job_object(found), "events": events})
        return
    _print_job(found)
    _print_events(events)


def retry_command(
    job: JobArgument,
    from_stage: Annotated[
        str | None,
        typer.Option("--from-stage", metavar="STAGE", help="An earlier stage to start at. Default: where it stands."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a job again that failed, was cancelled, or (with --from-stage) is done."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import as_object, note, print_json, print_line
    from upload_pipeline.database.job_control import retry_job

    with reading_database() as connection:
        restarted = retry_job(connection, job, from_stage=from_stage)
    if as_json:
        print_json(as_object(restarted))
        return
    print_line(f"Job {restarted.job_id} starts again at stage {restarted.stage}.")
    note("A worker takes it up; `upload-pipeline worker` starts one where none is running.")


def cancel_command(job: JobArgument, as_json: JsonOption = False) -> None:
    """Stop a job: at once, or at its next step where a worker is busy with it."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import as_object, print_json, print_line
    from upload_pipeline.database.job_control import cancel_job

    with reading_database() as connection:
        cancelled = cancel_job(connection, job)
    if as_json:
        print_json(as_object(cancelled))
        return
    meaning = {
        "cancelled": "is cancelled",
        "working": "stops at its next step",
        "done": "was done already; nothing changed",
        "deadletter": "had failed already; nothing changed",
    }
    print_line(f"Job {cancelled.job_id} {meaning.get(cancelled.state, f'is {cancelled.state}')}.")


def job_object(job: JobListing) -> dict[str, Any]:
    """A job as JSON shows it: the listing's fields, with the error as one object or null."""
    from upload_pipeline.cli.output import as_object

    fields = as_object(job)
    code, message = fields.pop("error_code"), fields.pop("error_message")
    fields["error"] = {"code": code, "message": message} if code is not None else None
    return fields


def _find(connection: Connection[Any], job_id: UUID) -> JobListing:
    from upload_pipeline.database.listings import find_job
    from upload_pipeline.errors import ErrorCode, PipelineError

    found = find_job(connection, job_id)
    if found is None:
        raise PipelineError(
            ErrorCode.JOB_NOT_FOUND, f"There is no job {job_id}. `upload-pipeline jobs` lists those that there are."
        )
    return found


def _print_jobs(found: list[JobListing]) -> None:
    from upload_pipeline.cli.output import ago, print_table, state_text, table

    columns = ("JOB", "STATE", "STAGE", "CREATED", "FILE")
    rows = ((str(job.job_id), state_text(job.state), job.stage, ago(job.created_at), _file_text(job)) for job in found)
    print_table(table(columns, rows, spare=("STAGE", "CREATED")))


def _file_text(job: JobListing) -> Text:
    from rich.text import Text

    text = Text(job.filename)
    if job.error_code is not None and job.state in _FAILED:
        # First, since the file's name is cut where the terminal is narrow.
        text = Text.assemble((job.error_code, "red"), " ", text)
    return text


def _print_job(job: JobListing) -> None:
    from rich.text import Text

    from upload_pipeline.cli.output import ago, print_fields, state_text

    error = None if job.error_code is None else Text(f"{job.error_code}: {job.error_message}", style="red")
    results = None if not job.results else ", ".join(f"{name} {value}" for name, value in sorted(job.results.items()))
    print_fields(
        [
            ("Job", job.job_id),
            ("File", job.filename),
            ("Document", job.document_id),
            ("Photo", job.photo_id),
            ("User", job.user_id),
            ("State", state_text(job.state)),
            ("Stage", f"{job.stage} ({job.progress} %)"),
            ("Retries", job.retry_count or None),
            ("Next try", ago(job.run_at) if job.state == "retryable" else None),
            ("Cancel", "asked for" if job.cancel_requested and job.state == "working" else None),
            ("Error", error),
            ("Results", results),
            ("Worker", job.worker_id),
            ("Created", f"{job.created_at:%Y-%m-%d %H:%M:%S} ({ago(job.created_at)})"),
            (
                "Finished",
                None if job.finished_at is None else f"{job.finished_at:%Y-%m-%d %H:%M:%S} ({ago(job.finished_at)})",
            ),
        ]
    )


def _print_events(events: list[EventListing]) -> None:
    import json

    from rich.table import Table
    from rich.text import Text

    from upload_pipeline.cli.output import out, print_table

    if not events:
        return
    out().print()
    styles = {"error": "red", "warning": "yellow", "debug": "dim"}
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for name in ("AT (UTC)", "EVENT", "STAGE"):
        made.add_column(name, no_wrap=True)
    made.add_column("DETAILS", overflow="fold")
    for event in events:
        payload = ", ".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in (event.payload or {}).items()
        )
        made.add_row(
            f"{event.at:%H:%M:%S.%f}"[:-3],
            Text(event.code, style=styles.get(event.severity, "")),
            event.stage or "",
            Text(" ".join(payload.split())),
        )
    print_table(made)
