"""Bytes that were announced: taken from their sender, checked, and put where their document awaits them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

from upload_pipeline.database import uploads
from upload_pipeline.database.uploads import Upload
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.placing import named, until_answered, withdraw_object
from upload_pipeline.intake.staging import Intake, finish, removed_on_failure, store_chunks
from upload_pipeline.media_types import detect_media_type
from upload_pipeline.storage.keys import incoming_key
from upload_pipeline.storage.objects import StoredObject


async def receive_upload(
    intake: Intake, *, document_id: UUID, file_bytes: int, file_sha256: str, chunks: AsyncIterator[bytes]
) -> None:
    """Takes the announced bytes of a document as they arrive; memory does not grow with them.

    They are put in place only once they are whole and found to be those that were announced, and then the document's
    job starts, also where it had given them up. Safe to repeat, also at once: bytes that the document has already are
    checked and let go. A failure leaves nothing, and the document goes on waiting.

    Args:
        intake: database, store.
        document_id: of `reserve_upload`.
        file_bytes: how many bytes were announced.
        file_sha256: which ones, 64 lower-case hexadecimal digits.
        chunks: the bytes; what this raises comes out unchanged.

    Raises:
        PipelineError: `DOCUMENT_NOT_FOUND`, also where it is deleted meanwhile; `CHECKSUM_MISMATCH` for other bytes, or
            more, or fewer; `UNSUPPORTED_TYPE`, `TYPE_MISMATCH`, `ENCRYPTED` by their content; `INSUFFICIENT_STORAGE`,
            `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`, `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    upload = await named(uploads.load_upload(intake.db, document_id), f"look up document {document_id}")
    if upload is None:
        raise _no_such_document(document_id)
    incoming = incoming_key(uuid4())
    async with removed_on_failure(intake.store, incoming):
        stored = await _store_exactly(intake, upload, incoming, file_bytes, file_sha256, chunks)
        media_type = detect_media_type(upload.filename, stored.head, size=stored.size)
        if not upload.awaited and await intake.store.head(upload.raw_key) is not None:
            await intake.store.delete([incoming])
            return
        await _put_in_place(intake, upload, incoming, media_type, stored.size)


async def announce_upload(intake: Intake, *, document_id: UUID) -> None:
    """Lets the job of an awaited document look for its bytes now; it checks them as ever. Safe to repeat.

    Raises:
        PipelineError: `DOCUMENT_NOT_FOUND`; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
    """
    found = await named(uploads.announce_upload(intake.db, document_id), f"announce the bytes of {document_id}")
    if not found:
        raise _no_such_document(document_id)


async def _store_exactly(
    intake: Intake, upload: Upload, key: str, file_bytes: int, file_sha256: str, chunks: AsyncIterator[bytes]
) -> StoredObject:
    try:
        stored = await store_chunks(
            intake, key, chunks, filename=upload.filename, max_bytes=file_bytes, expected=file_bytes
        )
    except PipelineError as error:
        if error.code is ErrorCode.FILE_TOO_LARGE:
            raise _other_bytes(upload, f"more than the {file_bytes} bytes came") from error
        raise
    if stored.size != file_bytes:
        raise _other_bytes(upload, f"{stored.size} bytes came instead of {file_bytes}")
    if stored.sha256 != file_sha256:
        raise _other_bytes(upload, f"its sha256 is {stored.sha256} instead of {file_sha256}")
    return stored


async def _put_in_place(intake: Intake, upload: Upload, incoming: str, media_type: str, size: int) -> None:
    try:
        await intake.store.move(incoming, upload.raw_key)
        confirmed = await until_answered(
            intake,
            lambda: uploads.confirm_upload(intake.db, upload, media_type=media_type, file_bytes=size),
            f"confirm the bytes of {upload.filename!r}",
        )
        if not confirmed:
            raise _no_such_document(upload.document_id)
    except BaseException:
        # Where the document still is, it has its bytes now whoever says so: its job looks for itself.
        await finish(withdraw_object(intake, upload.raw_key))
        raise


def _other_bytes(upload: Upload, found: str) -> PipelineError:
    return PipelineError(
        ErrorCode.CHECKSUM_MISMATCH,
        f"What was sent for {upload.filename!r} is not what was announced: {found}. Send the announced file, or "
        "announce the one that you have.",
        {"filename": upload.filename},
    )


def _no_such_document(document_id: UUID) -> PipelineError:
    return PipelineError(
        ErrorCode.DOCUMENT_NOT_FOUND,
        f"There is no document {document_id} that awaits bytes: it was deleted. Announce the file again.",
        {"document_id": str(document_id)},
    )
