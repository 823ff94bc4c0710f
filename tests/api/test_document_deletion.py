"""Deleting over HTTP: whole, safe to repeat, and finished by maintenance whatever dies in between."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from postgres_servers import Database

from tests.api.cut_short_deletions import delete_and_be_killed, maintenance
from tests.api.document_rows import StoredDocument, add_document, add_text, objects_left, rows_left
from tests.api.job_rows import TTL, add_job, claim
from tests.api.live_service import LiveService, new_user, running_service, service_settings
from upload_pipeline.database import queue
from upload_pipeline.database.queue import Advance
from upload_pipeline.storage.keys import markdown_key, parser_output_key, raw_key

TEXT = "Of bridges. " * 9
text_key = partial(markdown_key, sha256=sha256(TEXT.encode()).hexdigest())

STOPPING = """
import asyncio, sys
from pathlib import Path
from uuid import UUID

import asyncpg

from upload_pipeline.database.deletion import delete_document


async def main(url, document):
    async def stop(deleted):
        print("begun", flush=True)
        await asyncio.sleep(600)

    db = await asyncpg.connect(url)
    await delete_document(db, UUID(document), stop)


asyncio.run(main(*sys.argv[1:]))
"""
"""Begins a deletion and stops before the first object goes."""


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


async def whole_document(admin: asyncpg.Connection, service: LiveService, user: UUID) -> StoredDocument:
    """A document with every object and row that it can have, and a job that waits."""
    store = service.resources.store
    added = await add_text(admin, store, await add_document(admin, store, user), TEXT, chunks=3)
    await store.put_bytes(parser_output_key(user, added.document_id), b"parsed")
    await admin.execute(
        """
        with chunk as (
          select c.* from upload_pipeline.document_chunks c where c.document_id = $1 and c.ordinal = 0
        ), buffered as (
          insert into upload_pipeline.document_chunk_buffer
            (document_id, user_id, ordinal, chunk_id, text, chunk_sha256, chunker, start_offset, end_offset,
             heading_path, section_ids)
          select document_id, user_id, 0, gen_random_uuid(), text, chunk_sha256, 'c', 0, 1, '{}', '{}' from chunk
          returning chunk_id
        ), vector as (
          insert into upload_pipeline.document_vector_buffer (chunk_id, embed_model, document_id, embedding)
          select b.chunk_id, c.embed_model, $1, c.embedding from buffered b, chunk c
        ), node as (
          insert into upload_pipeline.document_outline
            (node_id, document_id, user_id, kind, title, level, ordinal, parent_id)
          select n.id, $1, c.user_id, n.kind::upload_pipeline.node_kind, '', 0, 0, n.parent
            from chunk c, (values ($1::uuid, 'document', null::uuid), ($2::uuid, 'section', $1)) n (id, kind, parent)
        )
        select 1
        """,
        added.document_id,
        added.job_id,
    )
    return added


async def test_nothing_of_it_is_left_and_nothing_of_others_is_gone(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    added, kept, foreign = [await whole_document(admin, service, owner) for owner in (user, user, new_user())]
    assert len(await rows_left(admin, added.document_id)) >= 7
    client = service.client(user)
    answer = await client.delete(f"/api/v2/documents/{added.document_id}", headers={"X-Correlation-ID": "asked-by-me"})
    assert (answer.status_code, answer.content) == (204, b"")
    assert await rows_left(admin, added.document_id) == {}
    assert await objects_left(service.resources.store) == sorted(
        key(one.user_id, one.document_id) for one in (kept, foreign) for key in (raw_key, text_key, parser_output_key)
    )
    before = await rows_left(admin, kept.document_id)
    assert await rows_left(admin, foreign.document_id) == before
    told = await admin.fetch(
        """
        select code::text, correlation_id from upload_pipeline.events where document_id = $1 order by event_id
        """,
        added.document_id,
    )
    assert [tuple(row) for row in told][-3:] == [
        ("job_cancelled", "test"),  # a job keeps the id that it came by
        ("document_deletion_started", "asked-by-me"),
        ("document_deleted", "asked-by-me"),
    ]
    # once it is gone it is like one that never was
    for _ in range(2):
        again = await client.delete(f"/api/v2/documents/{added.document_id}")
        assert (again.status_code, again.json()["error"]["code"]) == (404, "DOCUMENT_NOT_FOUND")
    assert await admin.fetchval("select count(*) from upload_pipeline.events where code = 'document_deleted'") == 1


async def test_a_job_at_work_is_fenced_off(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    added = await whole_document(admin, service, user)
    held = await claim(admin, added.job_id)
    assert (await service.client(user).delete(f"/api/v2/documents/{added.document_id}")).status_code == 204
    assert not await queue.advance_jobs(admin, [Advance(held.lease, held.stage, "job_validated", True)], ttl=TTL)
    with pytest.raises(asyncpg.PostgresError) as lost:
        await admin.execute("select upload_pipeline.check_lease($1, $2)", held.job_id, held.lease.token)
    assert lost.value.sqlstate == queue.LEASE_LOST
    assert await rows_left(admin, added.document_id) == {}


async def test_many_deletions_of_one_document_at_once_delete_it_once(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    added = await whole_document(admin, service, user)
    client = service.client(user)
    answers = await asyncio.gather(*(client.delete(f"/api/v2/documents/{added.document_id}") for _ in range(8)))
    assert {answer.status_code for answer in answers} <= {204, 404}
    assert 204 in {answer.status_code for answer in answers}
    assert await rows_left(admin, added.document_id) == {}
    assert await admin.fetchval("select count(*) from upload_pipeline.events where code = 'document_deleted'") == 1


async def test_a_deletion_that_the_store_refuses_is_ended_by_the_next_call(
    service: LiveService, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    user = new_user()
    added = await whole_document(admin, service, user)
    folder = tmp_path / "storage" / "raw" / str(user)
    aside = folder.rename(tmp_path / "aside")
    folder.symlink_to(aside)  # the store follows no links
    client = service.client(user)
    path = f"/api/v2/documents/{added.document_id}"
    refused = await client.delete(path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "STORAGE_DENIED")
    assert (await client.get(path)).status_code == 404
    assert (await service.client(new_user()).delete(path)).status_code == 404  # still nobody else's business
    assert (await rows_left(admin, added.document_id))["documents"] == 1
    folder.unlink()
    aside.rename(folder)
    assert (await client.delete(path)).status_code == 204
    assert await rows_left(admin, added.document_id) == {}
    assert await objects_left(service.resources.store) == []
    assert (await client.delete(path)).status_code == 404


async def test_a_document_without_objects_or_jobs_is_deleted_too(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    document = await admin.fetchval(
        "delete from upload_pipeline.upload_jobs where job_id = $1 returning document_id", job
    )
    assert (await service.client(user).delete(f"/api/v2/documents/{document}")).status_code == 204
    assert await rows_left(admin, document) == {}


async def test_a_service_killed_between_objects_and_rows_leaves_what_maintenance_finishes(
    service: LiveService, admin: asyncpg.Connection, database: Database
) -> None:
    user = new_user()
    added, kept = [await whole_document(admin, service, user) for _ in range(2)]
    await delete_and_be_killed(
        service,
        admin,
        database,
        user=user,
        path=f"/api/v2/documents/{added.document_id}",
        row=f"upload_pipeline.documents where document_id = '{added.document_id}'",
        verb="finish_deletion",
    )
    assert await objects_left(service.resources.store) == sorted(
        key(user, kept.document_id) for key in (raw_key, text_key, parser_output_key)
    )
    assert (await rows_left(admin, added.document_id))["document_chunks"] == 3
    assert await maintenance(service, database) == 0  # so young a deletion may be under way elsewhere
    await hidden_then_finished(service, admin, database, added)
    assert await rows_left(admin, added.document_id) == {}
    assert (await rows_left(admin, kept.document_id))["documents"] == 1


async def hidden_then_finished(
    service: LiveService, admin: asyncpg.Connection, database: Database, added: StoredDocument
) -> None:
    """The user sees nothing of the document; maintenance ends its deletion, once it is old enough."""
    client = service.client(added.user_id)
    assert (await client.get(f"/api/v2/documents/{added.document_id}")).status_code == 404
    listed = (await client.get("/api/v2/documents")).json()["items"]
    assert str(added.document_id) not in {item["document_id"] for item in listed}
    assert (await client.get(f"/api/v2/jobs/{added.job_id}")).status_code == 404
    hits = (await client.post("/api/v2/search", json={"query": "bridges", "mode": "text"})).json()["hits"]
    assert str(added.document_id) not in {hit["document_id"] for hit in hits}
    await admin.execute(
        "update upload_pipeline.documents set deleted_at = deleted_at - interval '2 minutes' where document_id = $1",
        added.document_id,
    )
    assert await maintenance(service, database) == 1


async def test_a_process_killed_before_the_objects_leaves_what_maintenance_finishes(
    service: LiveService, admin: asyncpg.Connection, database: Database
) -> None:
    user = new_user()
    added, kept = [await whole_document(admin, service, user) for _ in range(2)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STOPPING, database.worker_url, str(added.document_id), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    assert len(await objects_left(service.resources.store)) == 6
    await hidden_then_finished(service, admin, database, added)
    assert await rows_left(admin, added.document_id) == {}
    assert len(await objects_left(service.resources.store)) == 3
    assert (await rows_left(admin, kept.document_id))["documents"] == 1
