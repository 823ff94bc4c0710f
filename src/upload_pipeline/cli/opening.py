"""From the settings to a database that is ready to be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from psycopg import Connection

    from upload_pipeline.database.urls import DatabaseUrls
    from upload_pipeline.settings import Settings

INSUFFICIENT_PRIVILEGE = "42501"


def read_settings() -> Settings:
    """The settings of this process.

    Raises:
        PipelineError: `SETTING_INVALID`.
    """
    from upload_pipeline.settings import load_settings

    return load_settings()


def open_database(settings: Settings) -> DatabaseUrls:
    """Finds the database at the schema of this version; the embedded one is started and migrated where needed.

    Raises:
        PipelineError: `MIGRATIONS_PENDING` where a database of the user's own is behind; `DATABASE_UNAVAILABLE`,
            `MIGRATION_FAILED`, `SETTING_INVALID`.
    """
    from upload_pipeline.database.migrations import apply_migrations, pending_migrations
    from upload_pipeline.database.urls import resolve_database

    urls = resolve_database(settings)
    if urls.embedded:
        if pending_migrations(urls.admin):
            apply_migrations(urls.admin)
        return urls
    try:
        pending = pending_migrations(urls.admin)
    except PipelineError as error:
        if error.details.get("sqlstate") != INSUFFICIENT_PRIVILEGE:
            raise
        # `upload_worker` need not be able to read the ledger. What is missing shows at the first statement.
        return urls
    if pending:
        raise PipelineError(
            ErrorCode.MIGRATIONS_PENDING,
            f"The database lacks {', '.join(migration.file_name for migration in pending)}. "
            "Run `upload-pipeline migrate`.",
            {"pending": [migration.version for migration in pending]},
        )
    return urls


@contextmanager
def reading_database(settings: Settings | None = None) -> Iterator[Connection[Any]]:
    """A connection as `upload_worker` for listings and single verbs, each statement its own transaction.

    Raises:
        PipelineError: as `open_database`.
    """
    from upload_pipeline.database.connection import connect_sync, connection_options

    settings = settings or read_settings()
    urls = open_database(settings)
    connection = connect_sync(urls.worker, connection_options(settings, "upload-pipeline cli"), autocommit=True)
    with connection:
        yield connection
