"""API keys as the database has them: by their public part and a hash, never whole.

One function for each SQL function of `sql/schema/06_access.sql`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from upload_pipeline.database.queue import NOT_FOUND
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key that may be used now.

    Attributes:
        key_sha256: of the whole key, 64 lower-case hexadecimal digits.
        expires_at: None where it never does.
        stale: whether its last use was noted more than a minute ago.
    """

    key_id: UUID
    key_sha256: str
    user_id: UUID
    roles: tuple[str, ...]
    expires_at: datetime | None
    stale: bool


@dataclass(frozen=True, slots=True)
class KeyListing:
    """A key as an operator sees it."""

    key_id: UUID
    prefix: str
    user_id: UUID
    name: str
    roles: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


async def find_api_key(db: Executor, prefix: str) -> StoredKey | None:
    """The key of a prefix; None where there is none, or it is revoked or has expired."""
    row = await db.fetchrow("select * from upload_pipeline.find_api_key($1)", prefix)
    if row is None:
        return None
    return StoredKey(**{**dict(row), "roles": tuple(row["roles"])})


async def note_api_key_use(db: Executor, key_id: UUID) -> None:
    """Keeps when a key was last used, to the minute."""
    await db.fetchval("select upload_pipeline.note_api_key_use($1)", key_id)


def create_api_key(
    connection: Connection[Any],
    *,
    prefix: str,
    key_sha256: str,
    user_id: UUID,
    name: str,
    roles: Sequence[str],
    expires_at: datetime | None,
) -> UUID:
    """Stores a key; its id.

    Raises:
        PipelineError: `INVALID_ARGUMENT` where the database does not take the name or the user.
    """
    try:
        row = connection.execute(
            "select upload_pipeline.create_api_key(%s, %s, %s, %s, %s, %s)",
            [prefix, key_sha256, user_id, name, list(roles), expires_at],
        ).fetchone()
    except psycopg.errors.CheckViolation as error:
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            "A key needs a user who is not the nil UUID, and a name of 1 to 200 characters.",
        ) from error
    assert row is not None  # noqa: S101 - a function gives one row
    key_id: UUID = row[0]
    return key_id


def list_api_keys(connection: Connection[Any], *, user_id: UUID | None, limit: int) -> list[KeyListing]:
    """Keys, newest first; of one user where one is named."""
    with connection.cursor(row_factory=class_row(KeyListing)) as cursor:
        return cursor.execute("select * from upload_pipeline.list_api_keys(%s, %s)", [user_id, limit]).fetchall()


def revoke_api_key(connection: Connection[Any], key_id: UUID) -> bool:
    """Ends a key at once; False where that was done before.

    Raises:
        PipelineError: `INVALID_ARGUMENT` where there is no such key.
    """
    try:
        row = connection.execute("select upload_pipeline.revoke_api_key(%s)", [key_id]).fetchone()
    except psycopg.Error as error:
        if error.sqlstate != NOT_FOUND:
            raise
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            f"There is no API key {key_id}. `upload-pipeline keys list` shows the keys.",
        ) from error
    return bool(row and row[0])
