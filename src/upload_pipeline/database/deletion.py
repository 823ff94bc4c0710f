"""Deleting documents: rows and objects, in an order that a crash at any point leaves able to finish.

    begin (hidden, jobs ended) -> objects removed -> finish (rows removed)

Whatever dies in between, the document is already gone for its user, and `finish_deletions` ends the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from upload_pipeline.database import documents
from upload_pipeline.database.documents import DeletedDocument
from upload_pipeline.database.queue import Executor
from upload_pipeline.errors import PipelineError

D = TypeVar("D")

RemoveObjects = Callable[[DeletedDocument], Awaitable[None]]
"""Removes every object of a document; missing ones are fine."""


async def delete_document(
    db: Executor, document_id: UUID, remove_objects: RemoveObjects, *, correlation_id: str = ""
) -> bool:
    """Deletes a document with all that hangs on it; a running job is fenced off first. Safe to repeat.

    Args:
        db: as role `upload_worker`.
        document_id: of the document.
        remove_objects: removes what the store has of it.
        correlation_id: of the request, for the events.

    Returns:
        False where there is no such document.

    Raises:
        PipelineError: as `remove_objects` does; then the document is hidden, and maintenance goes on with it.
    """
    deleted = await documents.begin_deletion(db, document_id, correlation_id=correlation_id)
    if deleted is None:
        return False
    await remove_objects(deleted)
    await documents.finish_deletion(db, document_id, correlation_id=correlation_id)
    return True


async def finish_deletions(db: Executor, *, before: datetime, remove_objects: RemoveObjects) -> int:
    """Ends deletions that were begun before a moment and not finished; returns how many.

    Raises:
        PipelineError: as `remove_objects` does, the first one, after all others were tried.
    """
    begun = await documents.unfinished_deletions(db, before=before)
    return await end_deletions(begun, remove_objects, lambda each: documents.finish_deletion(db, each.document_id))


async def end_deletions(
    begun: Iterable[D], remove_objects: Callable[[D], Awaitable[None]], finish: Callable[[D], Awaitable[object]]
) -> int:
    """Ends deletions that were begun; returns how many.

    Args:
        begun: what is being deleted.
        remove_objects: removes what the store has of one.
        finish: removes its rows.

    Raises:
        PipelineError: as `remove_objects` does, the first one, after all others were tried.
    """
    finished = 0
    failure: PipelineError | None = None
    for deleted in begun:
        try:
            await remove_objects(deleted)
        except PipelineError as error:
            failure = failure or error
            continue
        await finish(deleted)
        finished += 1
    if failure is not None:
        raise failure
    return finished
