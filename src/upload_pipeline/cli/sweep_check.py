"""The check of `doctor` whether the store is swept for what crashes left, and is this database's to sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psycopg import Connection


def refusal_of_sweep(connection: Connection[Any]) -> str | None:
    """Why the latest sweep removed nothing, with the remedy; None where it could, or none was yet."""
    row = connection.execute("select refusal from upload_pipeline.upkeep_rounds where name = 'sweep'").fetchone()
    return None if row is None else row[0]
