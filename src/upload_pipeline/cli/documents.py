"""`documents` and `delete`: what is kept, and letting go of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from upload_pipeline.cli.arguments import JsonOption, LimitOption, OnlyUserOption, examples

if TYPE_CHECKING:
    from upload_pipeline.database.listings import DocumentListing
    from upload_pipeline.settings import Settings


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("documents", epilog=examples("upload-pipeline documents", "upload-pipeline documents --json"))(
        list_command
    )
    app.command("delete", epilog=examples("upload-pipeline delete 0b0f1f3c-58a1-5d0e-a6c7-3a4f5b7c9d21"))(
        delete_command
    )


def list_command(user: OnlyUserOption = None, limit: LimitOption = 50, as_json: JsonOption = False) -> None:
    """List documents, newest first. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json
    from upload_pipeline.database.listings import list_documents

    with reading_database() as connection:
        found = list_documents(connection, user_id=user, limit=limit + 1)
    if as_json:
        for document in found[:limit]:
            print_json(document)
    elif found:
        _print(found[:limit])
    else:
        note("No documents. `upload-pipeline ingest PATH` brings files in.")
    if len(found) > limit:
        note(f"These are the newest {limit}. There are more: --limit shows them.")


def delete_command(
    document: Annotated[
        UUID,
        typer.Argument(metavar="DOCUMENT_ID", help="Id of the document, as `documents` lists it.", show_default=False),
    ],
    as_json: JsonOption = False,
) -> None:
    """Delete a document with its chunks, its jobs and its stored files. There is no way back."""
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.errors import ErrorCode, PipelineError

    if not run(_delete(read_settings(), document)):
        raise PipelineError(
            ErrorCode.DOCUMENT_NOT_FOUND,
            f"There is no document {document}. `upload-pipeline documents` lists those that there are.",
        )
    if as_json:
        print_json({"document_id": document, "deleted": True})
    else:
        print_line(f"Document {document} is deleted.")


async def _delete(settings: Settings, document_id: UUID) -> bool:
    import asyncio

    from upload_pipeline.cli.opening import open_database
    from upload_pipeline.database.connection import connection_options
    from upload_pipeline.database.deletion import delete_document
    from upload_pipeline.database.documents import DeletedDocument
    from upload_pipeline.database.pools import open_pool
    from upload_pipeline.storage.configured import configured_store
    from upload_pipeline.storage.document_objects import remove_document_objects

    urls = await asyncio.to_thread(open_database, settings)
    store = configured_store(settings)

    async def remove_objects(deleted: DeletedDocument) -> None:
        await remove_document_objects(store, document_id=deleted.document_id, raw_key=deleted.raw_key)

    db = await open_pool(urls.worker, connection_options(settings, "upload-pipeline delete"), size=1)
    try:
        return await delete_document(db, document_id, remove_objects)
    finally:
        await db.close()


def _print(found: list[DocumentListing]) -> None:
    from upload_pipeline.cli.output import ago, print_table, size_text, state_text, table

    columns = ("DOCUMENT", "STATE", "SIZE", "PAGES", "CHUNKS", "CREATED", "FILE")
    rows = (
        (
            str(document.document_id),
            state_text(document.state or ("done" if document.searchable_at else "-")),
            size_text(document.file_bytes),
            "-" if document.page_count is None else str(document.page_count),
            "-" if document.chunk_count is None else str(document.chunk_count),
            ago(document.created_at),
            document.filename,
        )
        for document in found
    )
    print_table(table(columns, rows, spare=("SIZE", "PAGES", "CHUNKS", "CREATED")))
