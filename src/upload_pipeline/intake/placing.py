"""Staged bytes to their raw key, and back out again where they become no document.

Two intakes of the same bytes share one raw key, and so do an intake and the deletion of an older document of the
same bytes. An object is therefore removed only when the database says that no document has it, and whoever removes
one looks at the database again after, as whoever gets a document looks at the object again after. Whichever comes
last sees the other, and puts the bytes back.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar
from uuid import uuid4

import structlog

from upload_pipeline.database import documents
from upload_pipeline.database.documents import AcceptedDocument
from upload_pipeline.database.failures import DATABASE_FAILURES, translate
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.staging import Intake, StagedFile, discard, removed_on_failure, store_local
from upload_pipeline.storage.keys import incoming_key

log = structlog.get_logger(__name__)

T = TypeVar("T")


async def find_known(intake: Intake, staged: StagedFile) -> AcceptedDocument | None:
    """The document that the user's bytes already are, or None.

    Raises:
        PipelineError: `INVALID_STATE` while it is being deleted; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    return await named(
        documents.find_duplicate(intake.db, user_id=staged.arrival.user_id, file_sha256=staged.sha256),
        f"look up {staged.arrival.filename!r}",
    )


async def place(intake: Intake, staged: StagedFile) -> None:
    """Gives opened bytes their raw key. Where this, or what follows it, fails: `withdraw`."""
    await intake.store.move(staged.incoming, staged.raw_key)


async def withdraw(intake: Intake, staged: StagedFile) -> None:
    """Removes the raw object if no document has it. Never raises: what cannot be removed is left for maintenance."""
    try:
        if await _has_document(intake, staged):
            return
        await intake.store.delete([staged.raw_key])
        if await _has_document(intake, staged):
            await _put_again(intake, staged)
    except Exception as error:  # noqa: BLE001 - the failure that led here is the one to report; maintenance sweeps
        log.warning("object_left_for_maintenance", key=staged.raw_key, error=str(error) or type(error).__name__)


async def confirm_placed(intake: Intake, staged: StagedFile) -> None:
    """Looks at the object once its document has a row, and puts it back where another has removed it meanwhile.

    Never raises a `PipelineError`: the document is accepted, and its job will say so should the object be missing.
    """
    try:
        if await intake.store.head(staged.raw_key) is None:
            await _put_again(intake, staged)
    except PipelineError as error:
        log.warning("object_not_confirmed", key=staged.raw_key, error=str(error))


async def bring_back(intake: Intake, staged: StagedFile) -> None:
    """Of bytes that are a document already: puts its object back where it is gone, else lets go of what was staged."""
    if await intake.store.head(staged.raw_key) is not None:
        if staged.streamed:
            await discard(intake, staged)
    elif staged.streamed:
        await intake.store.move(staged.incoming, staged.raw_key)
    else:
        await _put_again(intake, staged)


async def named(statement: Awaitable[T], action: str) -> T:
    """Waits for a statement; a failure of the database comes out as `PipelineError` that names the action."""
    try:
        return await statement
    except DATABASE_FAILURES as error:
        raise translate(error, action) from error


async def _has_document(intake: Intake, staged: StagedFile) -> bool:
    try:
        return await find_known(intake, staged) is not None
    except PipelineError as error:
        if error.code is ErrorCode.INVALID_STATE:  # it is being deleted, and its object with it
            return False
        raise


async def _put_again(intake: Intake, staged: StagedFile) -> None:
    incoming = incoming_key(uuid4())
    async with removed_on_failure(intake.store, incoming):
        await store_local(intake, staged, incoming)
        await intake.store.move(incoming, staged.raw_key)
