"""Staged bytes to their raw key, and back out again where they become no document.

Two intakes of the same bytes share one raw key, and so do an intake and the deletion of an older document of the
same bytes. An object is therefore removed only when the database says that no document has it, and whoever removes
one looks at the database again after, as whoever gets a document looks at the object again after. Whichever comes
last sees the other, and puts the bytes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import TypeVar
from uuid import uuid4

import structlog

from upload_pipeline.database import documents, uploads
from upload_pipeline.database.documents import AcceptedDocument
from upload_pipeline.database.failures import DATABASE_FAILURES, translate
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.staging import Intake, StagedFile, discard, removed_on_failure, store_local
from upload_pipeline.storage.aside import withdraw as remove_unwanted
from upload_pipeline.storage.keys import incoming_key

log = structlog.get_logger(__name__)

RETRY_PAUSE = 0.25
"""Seconds between two tries of a statement."""

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


async def addressed(intake: Intake, staged: StagedFile) -> StagedFile:
    """The file under id and key of the user's document that has or awaits its bytes; unchanged where there is none.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    found = uploads.find_upload(intake.db, user_id=staged.arrival.user_id, file_sha256=staged.sha256)
    return replace(staged, known=await named(found, f"look up {staged.arrival.filename!r}"))


async def place(intake: Intake, staged: StagedFile) -> None:
    """Gives opened bytes their raw key. Where this, or what follows it, fails: `withdraw`."""
    await intake.store.move(staged.incoming, staged.raw_key)


async def withdraw(intake: Intake, staged: StagedFile) -> None:
    """Takes the bytes of a file that becomes no document out again; see `withdraw_object`."""
    await withdraw_object(intake, staged.raw_key)


async def withdraw_object(intake: Intake, key: str) -> None:
    """Removes a raw object unless a document has it or awaits it.

    Never raises: what cannot be removed is left for maintenance.
    """

    async def wanted(keys: Collection[str]) -> set[str]:
        return {key for key in keys if await _is_wanted(intake, key)}

    try:
        await remove_unwanted(intake.store, [key], wanted)
    except Exception as error:  # noqa: BLE001 - the failure that led here is the one to report; maintenance sweeps
        log.warning("object_left_for_maintenance", key=key, error=str(error) or type(error).__name__)


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


async def until_answered(intake: Intake, ask: Callable[[], Awaitable[T]], action: str) -> T:
    """Asks the database until it answers, for `intake.retry_seconds`.

    After a lost connection the statement may have done its work, so it must be one that may be repeated.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE` once the time is over; and as `named` does.
    """
    give_up = time.monotonic() + intake.retry_seconds
    while True:
        try:
            return await named(ask(), action)
        except PipelineError as error:
            if error.code is not ErrorCode.DATABASE_UNAVAILABLE or time.monotonic() + RETRY_PAUSE >= give_up:
                raise
            log.warning("statement_retried", action=action, error=error.message)
        await asyncio.sleep(RETRY_PAUSE)


async def named(statement: Awaitable[T], action: str) -> T:
    """Waits for a statement; a failure of the database comes out as `PipelineError` that names the action."""
    try:
        return await statement
    except DATABASE_FAILURES as error:
        raise translate(error, action) from error


async def _is_wanted(intake: Intake, key: str) -> bool:
    return await named(uploads.has_document(intake.db, key), f"look up {key}")


async def _put_again(intake: Intake, staged: StagedFile) -> None:
    incoming = incoming_key(uuid4())
    async with removed_on_failure(intake.store, incoming):
        await store_local(intake, staged, incoming)
        await intake.store.move(incoming, staged.raw_key)
