"""Brings a database to the schema of this version, with the ledger that the Supabase CLI keeps.

The ledger is `supabase_migrations.schema_migrations(version, statements, name)`, so `upload-pipeline migrate` and
`supabase db push` can take turns on one database. Each migration is one transaction together with its row of the
ledger, and holds a transaction-level lock (a session-level one does not pass a pooler), so that any number of
processes may migrate at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from upload_pipeline.database.connection import ConnectionOptions, connect_sync, describe_url
from upload_pipeline.database.migration_files import MigrationFile, load_compat, load_migrations
from upload_pipeline.database.sql_statements import split_statements
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg.rows import TupleRow

    from upload_pipeline.database.sql_statements import Statement

    Connection = psycopg.Connection[TupleRow]

_LOCK = 0x75706C6F61640001
"""Key of the advisory lock: the bytes of `upload`, then 1."""

_LOCK_WAIT = "10min"
_MIGRATION_OPTIONS = ConnectionOptions(
    application_name="upload-pipeline migrate",
    statement_timeout=0,
    lock_timeout=30.0,
    idle_transaction_timeout=600.0,
)
_TRANSACTION_WORDS = frozenset({"begin", "start", "commit", "end", "rollback", "abort"})
_SHOWN = 300

_LEDGER = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (version text not null primary key);
alter table supabase_migrations.schema_migrations add column if not exists statements text[];
alter table supabase_migrations.schema_migrations add column if not exists name text;
"""

_WHOLE_LEDGER = """
select 1 from pg_attribute
 where attrelid = to_regclass('supabase_migrations.schema_migrations') and attname in ('version', 'statements', 'name')
having count(*) = 3
"""


@dataclass(frozen=True, slots=True)
class AppliedMigration:
    """A migration that this call applied.

    Attributes:
        seconds: that it took.
    """

    version: str
    name: str
    seconds: float


def apply_migrations(url: str, *, migrations: Sequence[MigrationFile] | None = None) -> list[AppliedMigration]:
    """Applies what the database lacks, in order of version.

    A plain Postgres (no schema `auth`) first gets `sql/compat/plain_postgres.sql`, in the transaction of the first.

    Args:
        url: of the database, as the role that is to own the schema.
        migrations: in order; None takes the project's own.

    Returns:
        What this call applied; empty where nothing was pending or another process was faster.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE`; `MIGRATION_FAILED` where a statement fails (its migration then left
            nothing, earlier ones stay) or the database and the files contradict each other.
    """
    known = load_migrations().migrations if migrations is None else tuple(migrations)
    for migration in known:
        _refuse_transaction_words(migration)
    applied: list[AppliedMigration] = []
    with connect_sync(url, _MIGRATION_OPTIONS, autocommit=True) as connection:
        while True:
            begin = time.monotonic()
            try:
                with connection.transaction():
                    done = _apply_next(connection, known)
            except psycopg.Error as error:
                raise _failed(f"The migrations of {describe_url(url)} failed", error) from error
            if done is None:
                return applied
            applied.append(AppliedMigration(done.version, done.name, time.monotonic() - begin))


def pending_migrations(url: str, *, migrations: Sequence[MigrationFile] | None = None) -> list[MigrationFile]:
    """The migrations that the database lacks, in order. Changes nothing.

    Args:
        url: of the database, as a role that may read the ledger.
        migrations: in order; None takes the project's own.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE`; `MIGRATION_FAILED` where the ledger cannot be read or contradicts
            the files.
    """
    known = load_migrations().migrations if migrations is None else tuple(migrations)
    with connect_sync(url, _MIGRATION_OPTIONS, autocommit=True) as connection:
        try:
            return _pending(connection, known)
        except psycopg.Error as error:
            raise _failed(f"The ledger of migrations of {describe_url(url)} cannot be read", error) from error


def _apply_next(connection: Connection, known: Sequence[MigrationFile]) -> MigrationFile | None:
    """Applies the first pending migration within the open transaction; None where none is pending."""
    connection.execute(sql.SQL("set local lock_timeout = {}").format(_LOCK_WAIT))
    connection.execute("select pg_advisory_xact_lock(%s)", [_LOCK])
    connection.execute(sql.SQL("set local lock_timeout = {}").format(f"{_MIGRATION_OPTIONS.lock_timeout:.0f}s"))
    pending = _pending(connection, known)
    if not pending:
        return None
    migration = pending[0]
    if not _exists(connection, _WHOLE_LEDGER):
        connection.execute(_LEDGER)
    if not _exists(connection, "select to_regnamespace('auth')"):
        _run("sql/compat/plain_postgres.sql", split_statements(load_compat()), connection)
    statements = split_statements(migration.sql)
    _run(migration.file_name, statements, connection)
    connection.execute(
        "insert into supabase_migrations.schema_migrations (version, name, statements) values (%s, %s, %s)",
        [migration.version, migration.name, [statement.text for statement in statements]],
    )
    return migration


def _pending(connection: Connection, known: Sequence[MigrationFile]) -> list[MigrationFile]:
    ledger = _ledger(connection)
    files = {migration.version: migration for migration in known}
    unknown = sorted(ledger.keys() - files.keys())
    if unknown:
        raise PipelineError(
            ErrorCode.MIGRATION_FAILED,
            f"The database has the migration {', '.join(unknown)}, which this version of the program does not have: "
            "a newer one migrated it. Install that version, or point this one at another database.",
            {"versions": unknown},
        )
    changed = [version for version, statements in ledger.items() if _differs(files[version], statements)]
    if changed:
        raise PipelineError(
            ErrorCode.MIGRATION_FAILED,
            f"The migration {files[changed[0]].file_name} is not the one that was applied to this database under this "
            "number. Undo the change to the file and add a migration instead; or, where the database may be lost, "
            "start with an empty one.",
            {"versions": changed},
        )
    return [migration for migration in known if migration.version not in ledger]


def _ledger(connection: Connection) -> dict[str, list[str] | None]:
    """Applied versions with their statements, where the ledger holds those."""
    if not _exists(connection, "select to_regclass('supabase_migrations.schema_migrations')"):
        return {}
    rows = connection.execute(
        "select version, to_jsonb(l) -> 'statements' from supabase_migrations.schema_migrations as l order by version"
    )
    return {row[0]: row[1] for row in rows}


def _differs(migration: MigrationFile, statements: list[str] | None) -> bool:
    """Whether the ledger holds other statements than the file, but for space, comments and where they are cut."""
    if not statements:
        return False
    return _words(";\n".join(statements)) != _words(migration.sql)


def _words(text: str) -> list[str]:
    return [word for statement in split_statements(text) for word in statement.words]


def _run(file_name: str, statements: Sequence[Statement], connection: Connection) -> None:
    for number, statement in enumerate(statements, start=1):
        try:
            connection.execute(statement.text.encode(), prepare=False)
        except psycopg.Error as error:
            place = f"{file_name}, statement {number} of {len(statements)} (line {statement.line})"
            failed = _failed(f"{place} failed and nothing of this file was applied", error)
            shown = statement.text if len(statement.text) <= _SHOWN else f"{statement.text[:_SHOWN]} …"
            failed.details |= {"file": file_name, "statement": number, "line": statement.line}
            raise PipelineError(failed.code, f"{failed.message}\nStatement: {shown}", failed.details) from error


def _refuse_transaction_words(migration: MigrationFile) -> None:
    for statement in split_statements(migration.sql):
        if statement.words[0].lower() in _TRANSACTION_WORDS:
            raise PipelineError(
                ErrorCode.MIGRATION_FAILED,
                f"{migration.file_name}, line {statement.line}: each migration is one transaction already. "
                f"Take out `{statement.text[:_SHOWN]}`.",
            )


def _exists(connection: Connection, query: str) -> bool:
    row = connection.execute(query.encode()).fetchone()
    return row is not None and row[0] is not None


def _failed(what: str, error: psycopg.Error) -> PipelineError:
    diagnosis = error.diag
    text = diagnosis.message_primary or str(error).strip()
    parts = [f"{what}: {text} (SQLSTATE {error.sqlstate or 'none'})."]
    parts += [part for part in (diagnosis.message_detail, diagnosis.message_hint, _remedy(error)) if part]
    return PipelineError(ErrorCode.MIGRATION_FAILED, " ".join(parts), {"sqlstate": error.sqlstate})


def _remedy(error: psycopg.Error) -> str:
    match error.sqlstate:
        case "42501":
            return (
                "Migrate as the role that owns the database (UPLOAD_PIPELINE_MIGRATION_DATABASE_URL); on a plain "
                "Postgres the first time as a superuser."
            )
        case "55P03":
            return "Something else holds a lock on these tables; end it or try again later."
        case "0A000" | "58P01" if "vector" in str(error):
            return "Install pgvector on the server of the database."
        case _:
            return ""
