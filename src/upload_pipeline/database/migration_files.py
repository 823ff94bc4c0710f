"""Finds the SQL that makes the schema, in a checkout as in an installed package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from upload_pipeline.errors import ErrorCode, PipelineError

_PACKAGED = Path(__file__).parent / "sql"
_CHECKOUT = Path(__file__).parents[3]

# The Supabase CLI's rule: https://supabase.com/docs/reference/cli/supabase-migration-up
_FILE_NAME = re.compile(r"([0-9]+)_(.*)\.sql")


@dataclass(frozen=True, slots=True)
class MigrationFile:
    """A migration as it lies in its file.

    Attributes:
        version: the digits that its name begins with; orders the migrations, as text.
        name: what follows them.
        sql: the file's text.
    """

    version: str
    name: str
    sql: str

    @property
    def file_name(self) -> str:
        """Name of the file."""
        return f"{self.version}_{self.name}.sql"


@dataclass(frozen=True, slots=True)
class MigrationFolder:
    """The migrations of a folder in order, and the names of files that are none by their name."""

    migrations: tuple[MigrationFile, ...]
    skipped: tuple[str, ...]


def load_migrations(folder: Path | None = None) -> MigrationFolder:
    """Reads the migrations.

    Args:
        folder: where they lie; None takes the project's own.

    Raises:
        PipelineError: `MIGRATION_FAILED` where the folder or a file cannot be read, or two files have one version.
    """
    folder = folder or _first_existing(_PACKAGED / "migrations", _CHECKOUT / "supabase" / "migrations")
    migrations: dict[str, MigrationFile] = {}
    skipped = []
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        for path in paths:
            match = _FILE_NAME.fullmatch(path.name)
            if match is None:
                skipped.append(path.name)
                continue
            migration = MigrationFile(match[1], match[2], path.read_text(encoding="utf-8"))
            if migration.version in migrations:
                raise PipelineError(
                    ErrorCode.MIGRATION_FAILED,
                    f"Two migrations have version {migration.version}: "
                    f"{migrations[migration.version].file_name} and {path.name}. Rename one.",
                )
            migrations[migration.version] = migration
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(
            ErrorCode.MIGRATION_FAILED, f"The migrations in {folder} cannot be read: {error}. Install the project anew."
        ) from error
    return MigrationFolder(tuple(migrations[version] for version in sorted(migrations)), tuple(skipped))


def load_compat() -> str:
    """The SQL that gives a plain Postgres what the migrations take from Supabase.

    Raises:
        PipelineError: `MIGRATION_FAILED` where it cannot be read.
    """
    path = _first_existing(_PACKAGED / "compat", _CHECKOUT / "sql" / "compat") / "plain_postgres.sql"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PipelineError(
            ErrorCode.MIGRATION_FAILED, f"{path} cannot be read: {error}. Install the project anew."
        ) from error


def _first_existing(packaged: Path, checkout: Path) -> Path:
    return packaged if packaged.is_dir() else checkout
