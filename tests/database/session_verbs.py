"""The verbs of sessions as the tests call them, and files that come by them."""

from __future__ import annotations

from hashlib import sha256
from typing import Any
from uuid import UUID

from sessions import Connection
from verbs import value

from upload_pipeline import ids

LIFE = "30 days"
GRACE = "1 day"


def digest(text: str) -> str:
    """A sha256 in hexadecimal digits."""
    return sha256(text.encode()).hexdigest()


def open_session(db: Connection, token: str, life: str = LIFE) -> Any:
    """The new session of a token."""
    return db.execute("select * from upload_pipeline.open_session(%s, %s::interval)", [digest(token), life]).fetchone()


def find_session(db: Connection, token: str, life: str = LIFE) -> Any:
    """The session of a token, or None."""
    return db.execute("select * from upload_pipeline.find_session(%s, %s::interval)", [digest(token), life]).fetchone()


def end_session(db: Connection, token: str) -> bool:
    """Whether there was a session to end."""
    return bool(value(db, "select upload_pipeline.end_session(%s)", digest(token)))


def claim_session(db: Connection, token: str, user: UUID) -> Any:
    """What `claim_session` answers."""
    return db.execute("select * from upload_pipeline.claim_session(%s, %s)", [digest(token), user]).fetchone()


def clean_sessions(db: Connection, grace: str = GRACE) -> tuple[int, int]:
    """How many sessions went, and how many deletions have begun, in one round."""
    removed = documents = 0
    for row in db.execute("select * from upload_pipeline.sessions_to_clean(%s::interval)", [grace]).fetchall():
        cleaned = db.execute(
            "select * from upload_pipeline.clean_session(%s, %s::interval)", [row.session_id, grace]
        ).fetchone()
        assert cleaned is not None
        removed += cleaned.removed
        documents += cleaned.documents
    return removed, documents


def upload(db: Connection, user: UUID, content: str, filename: str = "paper.txt") -> Any:
    """What `accept_document` answers for a file of this content."""
    sha = digest(content)
    document = ids.document_id(user, sha)
    return db.execute(
        """
        select * from upload_pipeline.accept_document(
          %s, %s, %s, 'text/plain', 10, %s, %s, p_correlation_id => 'c')
        """,
        [document, user, filename, sha, f"raw/{user}/{document}"],
    ).fetchone()


def finish_deletions(db: Connection) -> int:
    """Ends every deletion that has begun; how many."""
    rows = db.execute("select document_id from upload_pipeline.unfinished_deletions('infinity', 10000)").fetchall()
    return sum(value(db, "select upload_pipeline.finish_deletion(%s)", row.document_id) for row in rows)


def owners(db: Connection) -> dict[UUID, UUID]:
    """Whose each document is that is not being deleted."""
    rows = db.execute("select document_id, user_id from upload_pipeline.documents where deleted_at is null").fetchall()
    return {row.document_id: row.user_id for row in rows}


def traces(admin: Connection, user: UUID) -> dict[str, int]:
    """How many rows of each table name a user."""
    tables = admin.execute(
        """
        select c.table_name from information_schema.columns c
          join information_schema.tables t using (table_schema, table_name)
         where c.table_schema = 'upload_pipeline' and c.column_name = 'user_id' and t.table_type = 'BASE TABLE'
        """
    ).fetchall()
    counted = {
        row.table_name: value(admin, f"select count(*) from upload_pipeline.{row.table_name} where user_id = %s", user)
        for row in tables
        if not row.table_name.startswith("events_")
    }
    return {table: count for table, count in counted.items() if count}
