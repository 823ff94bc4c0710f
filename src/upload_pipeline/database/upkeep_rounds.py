"""Rounds of upkeep that one worker does for all, and the marks by which a database knows its store.

One function for each SQL function of `sql/schema/06_upkeep.sql`, which tells what they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from datetime import timedelta

    from upload_pipeline.database.queue import Executor


async def claim_upkeep(db: Executor, name: str, interval: timedelta) -> bool:
    """Whether the caller is to do a round now: true for one caller in each interval."""
    return bool(await db.fetchval("select upload_pipeline.claim_upkeep($1, $2)", name, interval))


async def note_upkeep(db: Executor, name: str, refusal: str | None) -> None:
    """Says why a round did nothing, which is an alarm; or None, where it did what it is for."""
    await db.fetchval("select upload_pipeline.note_upkeep($1, $2)", name, refusal)


async def mark_store(db: Executor, found: UUID | None) -> UUID:
    """A mark to be written into the store in the place of the one found; this database knows it from now on."""
    mark: UUID = await db.fetchval("select upload_pipeline.mark_store($1)", found)
    return mark


async def is_store_mark(db: Executor, mark: UUID) -> bool:
    """Whether a mark that is found in the store is one of this database's."""
    return bool(await db.fetchval("select upload_pipeline.is_store_mark($1)", mark))
