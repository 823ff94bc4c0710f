"""Anonymous sessions of browsers, as the database has them: by a hash of their cookie, never by the cookie.

One function for each SQL function of `sql/schema/06_sessions.sql`, which tells what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime, timedelta
    from uuid import UUID

    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class Session:
    """A session that is not over.

    Attributes:
        user_id: the user that it is; of its own, and nobody's else.
        slid: whether its end has just been moved.
    """

    session_id: UUID
    user_id: UUID
    expires_at: datetime
    slid: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of making a session's documents a user's.

    Attributes:
        user_id: of the session.
        documents: those that are the user's now, with the ids that they had.
        duplicates: for each that was given up, the user's own document of the same bytes.
        remaining: how many are left for the next call.
    """

    session_id: UUID
    user_id: UUID
    documents: tuple[UUID, ...]
    duplicates: dict[UUID, UUID]
    remaining: int


async def open_session(db: Executor, token_sha256: str, life: timedelta) -> Session:
    """A new session, of a user that nobody has been before.

    Args:
        db: as role `upload_worker`.
        token_sha256: of its cookie, 64 lower-case hexadecimal digits.
        life: until it is over, unless it is used.
    """
    row = await db.fetchrow("select * from upload_pipeline.open_session($1, $2)", token_sha256, life)
    return Session(**row, slid=False)


async def find_session(db: Executor, token_sha256: str, life: timedelta) -> Session | None:
    """The session of a cookie, its end moved to `life` from now; None where there is none or it is over."""
    row = await db.fetchrow("select * from upload_pipeline.find_session($1, $2)", token_sha256, life)
    return Session(**row) if row else None


async def end_session(db: Executor, token_sha256: str) -> bool:
    """Ends a session at once; False where there is none to end."""
    return bool(await db.fetchval("select upload_pipeline.end_session($1)", token_sha256))


async def claim_session(db: Executor, token_sha256: str, user_id: UUID) -> Claim:
    """Makes a session's documents a user's, and ends the session. The same user again: the same answer.

    Raises:
        asyncpg.PostgresError: SQLSTATE UP002 where there is no such session or it is over; UP003 where another user
            has claimed it.
    """
    row = await db.fetchrow("select * from upload_pipeline.claim_session($1, $2)", token_sha256, user_id)
    return Claim(
        row["session_id"],
        row["user_id"],
        tuple(row["documents"]),
        dict(zip(row["duplicates"], row["existing_documents"], strict=True)),
        row["remaining"],
    )


async def clean_sessions(db: Executor, grace: timedelta, *, limit: int = 100) -> tuple[int, int]:
    """Cleans sessions that have been over for longer than `grace`, each in a transaction of its own.

    Documents that came to a claimed session late follow the others at once.

    Returns:
        How many sessions are gone, and of how many documents the deletion has begun.
    """
    removed = documents = 0
    for row in await db.fetch("select * from upload_pipeline.sessions_to_clean($1, $2)", grace, limit):
        cleaned = await db.fetchrow("select * from upload_pipeline.clean_session($1, $2)", row["session_id"], grace)
        removed += cleaned["removed"]
        documents += cleaned["documents"]
    return removed, documents
