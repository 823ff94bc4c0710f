"""What a person sees when something goes wrong: one line with a code, or one JSON object, and an exit status."""

from __future__ import annotations

import sys
from typing import Any

from upload_pipeline.errors import ErrorCode, PipelineError

FAILED = 1
USAGE = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

_USAGE_CODES = frozenset({ErrorCode.SETTING_INVALID, ErrorCode.INVALID_METADATA, ErrorCode.INVALID_ARGUMENT})


def exit_status(error: PipelineError) -> int:
    """2 where the caller has to change a setting or an argument, else 1."""
    return USAGE if error.code in _USAGE_CODES else FAILED


def show(error: PipelineError, *, as_json: bool) -> None:
    """Writes an error: a red line on standard error, or one object on standard output."""
    from upload_pipeline.cli.output import err, print_json, print_line

    if as_json:
        print_json({"error": error_object(error)})
        return
    print_line(f"{error.code}: {error.message}", err(), style="red")


def error_object(error: PipelineError) -> dict[str, Any]:
    """An error as JSON shows it."""
    return {"code": str(error.code), "message": error.message}


def expected(error: Exception) -> PipelineError | None:
    """Names an exception that can happen to a user; None for one that is a fault of ours.

    Drivers are looked up and not imported: an exception of theirs is only there where they are loaded.
    """
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, BrokenPipeError):
        return None  # the reader of our output has gone, as `head` does; Typer ends the command quietly
    if (psycopg := sys.modules.get("psycopg")) is not None and isinstance(error, psycopg.Error):
        diagnosis = error.diag.message_primary or str(error).strip() or type(error).__name__
        return _of_database(error.sqlstate or ("" if isinstance(error, psycopg.OperationalError) else None), diagnosis)
    if (asyncpg := sys.modules.get("asyncpg")) is not None:
        if isinstance(error, asyncpg.PostgresError):
            return _of_database(error.sqlstate, str(error))
        if isinstance(error, asyncpg.PostgresConnectionError | ConnectionError | TimeoutError):
            return _of_database("", str(error) or type(error).__name__)
    return None


def _of_database(sqlstate: str | None, reason: str) -> PipelineError | None:
    """Names a failure of the database by its SQLSTATE, by PostgreSQL's appendix A; "" is no connection."""
    reason = reason.rstrip(".")
    if sqlstate in ("42P01", "42883", "42703", "3F000"):
        return PipelineError(
            ErrorCode.MIGRATIONS_PENDING,
            f"The database lacks what this version needs: {reason}. Run `upload-pipeline migrate`.",
        )
    if sqlstate == "42501":
        return PipelineError(
            ErrorCode.DATABASE_UNAVAILABLE,
            f"The database does not let this role do that: {reason}. Let UPLOAD_PIPELINE_DATABASE_URL name the role "
            "`upload_worker`, and see `upload-pipeline doctor`.",
        )
    if sqlstate is not None and sqlstate[:2] in ("", "08", "40", "53", "55", "57"):
        return PipelineError(
            ErrorCode.DATABASE_UNAVAILABLE,
            f"The database did not answer as it should: {reason}. Try again; `upload-pipeline doctor` looks for the "
            "cause.",
        )
    return None
