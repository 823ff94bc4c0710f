"""What went wrong in the database, said in the words of the closed list of error codes."""

from __future__ import annotations

import asyncpg

from upload_pipeline.database.queue import INVALID_STATE
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import ENV_PREFIX

DATABASE_FAILURES: tuple[type[Exception], ...] = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
"""What a statement through asyncpg raises; `TimeoutError` and a refused connection are an `OSError`."""

# Connections (08), resources (53), operators and timeouts (57), locks and deadlocks (40, 55): PostgreSQL, appendix A.
_PASSING = frozenset({"08", "40", "53", "55", "57"})
# No such table, function or schema: the schema is not there, or older than this program.
_OUTDATED = frozenset({"42P01", "42883", "42703", "3F000"})


def translate(error: Exception, action: str) -> Exception:
    """Names a failure of the database.

    Args:
        error: one of `DATABASE_FAILURES`.
        action: what was tried, to complete "could not ...".

    Returns:
        A `PipelineError`: `INVALID_STATE` for SQLSTATE UP003, `MIGRATIONS_PENDING` where something that we call is
        not there, `DATABASE_UNAVAILABLE` where trying again can help; or the error itself where it has no such name.
    """
    if not isinstance(error, asyncpg.PostgresError):
        return _unavailable(action, str(error) or type(error).__name__)
    state = error.sqlstate or ""
    if state == INVALID_STATE:
        hint = getattr(error, "hint", None)
        message = f"Could not {action}: {error.args[0]}." + (f" {hint}" if hint else "")
        return PipelineError(ErrorCode.INVALID_STATE, message)
    if state in _OUTDATED:
        return PipelineError(
            ErrorCode.MIGRATIONS_PENDING,
            f"The database could not {action}: {error.args[0]}. Run `upload-pipeline migrate`, then try again.",
            {"sqlstate": state},
        )
    if state[:2] in _PASSING:
        return _unavailable(action, str(error.args[0]), state)
    unnamed: Exception = error
    return unnamed


def _unavailable(action: str, reason: str, sqlstate: str = "") -> PipelineError:
    return PipelineError(
        ErrorCode.DATABASE_UNAVAILABLE,
        f"The database could not {action}: {reason}. Check that the database that {ENV_PREFIX}DATABASE_URL names "
        "runs and answers, then try again.",
        {"sqlstate": sqlstate} if sqlstate else {},
    )
