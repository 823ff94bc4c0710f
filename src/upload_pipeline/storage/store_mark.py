"""Whose store it is: the mark of a database, and what speaks against removing what that database does not know.

To a database that is not the store's own, every file of the other is an orphan: to an empty one, to one for trials that
was given the address of the real store, to one that is restored from yesterday's backup. So each round leaves a
new mark in the store, of which its database alone knows. One that finds a mark that it does not know was not the last
to look here; a restored one does not know the marks that came after its backup. As long as rounds come no further apart
than orphans are left alone, all that is old enough to be removed is older than the last mark. A database that is put
back to a moment after that mark is not told from one that was not: `docs/storage.md` says what to do then.

A store without a mark is taken for the database's own where nearly all in it has a row. And whatever the marks
say: a round that would remove many objects, and not few of all, removes none. Crashes leave single objects; so many
say that rows are missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.orphans import Survey
from upload_pipeline.storage.store import ObjectStore

MARK_KEY = "owner/database"
"""Of the object that holds the mark."""

FEW = 100
"""Objects that a round may remove whatever part of all they are, from a store that is known to be the database's."""

SHARE = 0.1
"""The part of the objects beyond which a round removes none."""

_MARK_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Mark:
    """What the store says of its database.

    Attributes:
        value: the mark; None where the object is there and holds none.
    """

    value: UUID | None


async def read_mark(store: ObjectStore) -> Mark | None:
    """The mark of the store, None where there is none.

    Raises:
        PipelineError: as the store does.
    """
    try:
        text = await store.get_bytes(MARK_KEY, _MARK_BYTES)
    except PipelineError as error:
        if error.code is ErrorCode.OBJECT_MISSING:
            return None
        if error.code is ErrorCode.FILE_TOO_LARGE:
            return Mark(None)
        raise
    try:
        return Mark(UUID(text.decode("ascii").strip()))
    except ValueError:
        return Mark(None)


async def write_mark(store: ObjectStore, mark: UUID) -> None:
    """Puts a mark into the store in the place of the one before."""
    await store.put_bytes(MARK_KEY, f"{mark}\n".encode())


def too_many(survey: Survey, *, marked: bool) -> str | None:
    """What speaks against removing what a survey has found without a row; None where nothing does."""
    lost, seen = survey.without_row, survey.without_row + survey.with_row
    if lost <= seen * SHARE or (marked and lost <= FEW):
        return None
    mark = "" if marked else "it bears no database's mark yet, and "
    return f"{mark}{lost} of the {seen} objects that were looked at have no row in this database"
