"""Whether the schema is the one that this program was written for, as a role that may not read the ledger can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from upload_pipeline.database.migration_files import load_migrations
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor


async def require_migrations(db: Executor) -> None:
    """Passes where the database has every migration of this version.

    Args:
        db: as role `upload_worker`.

    Raises:
        PipelineError: `MIGRATIONS_PENDING`, naming what is missing.
        asyncpg.PostgresError: the database does not answer.
    """
    known = [migration.version for migration in load_migrations().migrations]
    try:
        rows = await db.fetch("select * from upload_pipeline.applied_migrations() as version")
    except (asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError) as error:
        raise _pending(known) from error
    applied = {row["version"] for row in rows}
    missing = [version for version in known if version not in applied]
    if missing:
        raise _pending(missing)


def _pending(versions: list[str]) -> PipelineError:
    return PipelineError(
        ErrorCode.MIGRATIONS_PENDING,
        f"The database lacks migrations ({', '.join(versions)}). Run `upload-pipeline migrate`.",
        {"pending": versions},
    )
