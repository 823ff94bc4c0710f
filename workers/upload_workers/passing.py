"""Which failures of the database pass: the same statement may succeed on another try."""

from __future__ import annotations

import asyncpg

# PostgreSQL, appendix A: connections (08), transactions undone by others (40), resources (53), objects in use (55),
# operators and timeouts (57).
_CLASSES = frozenset({"08", "40", "53", "55", "57"})


def is_passing(error: BaseException) -> bool:
    """Whether trying again can help. `TimeoutError` and a lost or refused connection are an `OSError`."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "")[:2] in _CLASSES
    return isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError)
