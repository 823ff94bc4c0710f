"""What a user's pages of documents and jobs read, counted in blocks, behind a long history of the user's and of others.

The statements run as the routes run them: as role `authenticated`, under row-level security. A plan for any parameters,
which Postgres may settle on at the sixth call of a connection, is held to the same bound as one for these.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from upload_pipeline.database import user_documents, user_jobs
from upload_pipeline.database.as_user import as_user

OWN = 10_000
FOREIGN = 20_000

PAGE = 51
"""Rows asked for: a page of the usual size, and one more that tells whether there are more."""

BOUND = 500
"""Blocks of such a page: some seven for each row, of the document, its newest job and what came of it."""

NEWEST = datetime(2026, 11, 1, tzinfo=UTC)

ADD_DOCUMENTS = """
insert into upload_pipeline.documents
  (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata, created_at)
select gen_random_uuid(), coalesce($1::uuid, md5((i % 1000)::text)::uuid), 'paper ' || i || '.txt', 'text/plain', 1000,
       encode(sha256((coalesce($1::text, '') || i)::bytea), 'hex'), gen_random_uuid(), '{"department": "claims"}',
       $3::timestamptz - i * interval '1 minute'
  from generate_series(1, $2::integer) i
"""

ADD_JOBS = """
insert into upload_pipeline.upload_jobs
  (document_id, user_id, pipeline, stage, pool, state, created_at, finished_at)
select document_id, user_id, 'document', 'embedded', 'default', 'done', created_at, created_at
  from upload_pipeline.documents
"""


ADD_CHUNKS = """
insert into upload_pipeline.document_chunks
  (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
   section_ids, embed_model, embedding, live)
select gen_random_uuid(), document_id, user_id, i, 'word ' || i, repeat('a', 64), 'c', i, i + 1, '{}', '{}', 'm', '[1]',
       true
  from (select document_id, user_id from upload_pipeline.documents where user_id = $1 limit 1) d,
       generate_series(0, 9999) i
returning document_id
"""

NOBODY = UUID(int=0)


async def explained(pool: asyncpg.Pool, user: UUID, mode: str, statement: str, *arguments: Any) -> dict[str, Any]:
    """What Postgres says of a statement that a user runs: its plan, and what it did."""
    async with as_user(pool, user, by_index=True) as connection:
        await connection.execute(f"set local plan_cache_mode = '{mode}'")
        await connection.execute(f"prepare asked as {statement}")
        # `execute` takes no parameters itself, and an `explain` of the bare statement is never planned for any.
        values = ", ".join("null" if value is None else f"'{value}'" for value in arguments)
        for _ in range(2):  # a session's first call reads the catalog
            told = await connection.fetchval(f"explain (analyze, buffers, format json) execute asked ({values})")
        await connection.execute("deallocate asked")
    plan: dict[str, Any] = json.loads(told)[0]
    return plan


def blocks(told: dict[str, Any]) -> int:
    return int(told["Plan"]["Shared Hit Blocks"] + told["Plan"]["Shared Read Blocks"])


async def test_a_page_costs_a_page_wherever_it_begins(database: Any) -> None:
    user = uuid4()
    owner = await asyncpg.connect(database.admin_url)
    try:
        await owner.execute("set session_replication_role = replica")
        for table in ("documents", "upload_jobs", "document_chunks"):
            await owner.execute(f"alter table upload_pipeline.{table} set (autovacuum_enabled = off)")
        await owner.execute(ADD_DOCUMENTS, user, OWN, NEWEST)
        await owner.execute(ADD_DOCUMENTS, None, FOREIGN, NEWEST)
        await owner.execute(ADD_JOBS)
        long_document = await owner.fetchval(ADD_CHUNKS, user)
        deep = (NEWEST - timedelta(minutes=round(OWN * 0.9)), NOBODY)
        bounds: dict[str, tuple[str, tuple[Any, ...]]] = {
            "documents, the newest": (user_documents._PAGE, (PAGE, None, None, None, None, None, None)),
            "documents, far back": (user_documents._PAGE, (PAGE, *deep, None, None, None, None)),
            "documents by state": (user_documents._PAGE, (PAGE, *deep, "done", "embedded", None, None)),
            "documents by metadata": (user_documents._PAGE, (PAGE, *deep, None, None, "p", '{"department": "claims"}')),
            "one document": (user_documents._ONE, (long_document,)),
            "chunks, the first": (user_documents._CHUNKS, (long_document, -1, PAGE)),
            "chunks, the last": (user_documents._CHUNKS, (long_document, 9_000, PAGE)),
            "jobs, the newest": (user_jobs._PAGE, (PAGE, 60.0, None, None, None, None, None, None, None)),
            "jobs, far back": (user_jobs._PAGE, (PAGE, 60.0, None, None, None, None, None, *deep)),
        }
        figures: dict[str, int] = {}
        async with asyncpg.create_pool(database.worker_url, min_size=1, max_size=1) as pool:
            for known in ("without statistics", "with statistics"):
                for mode in ("force_custom_plan", "force_generic_plan"):
                    for name, (statement, arguments) in bounds.items():
                        told = await explained(pool, user, mode, statement, *arguments)
                        assert told["Plan"]["Actual Rows"] == (1 if name == "one document" else PAGE), name
                        figures[f"{name}, {known}, {mode}"] = blocks(told)
                await owner.execute("analyze")
    finally:
        await owner.close()
    print(*(f"{name}: {seen}" for name, seen in figures.items()), sep="\n")
    assert {name: seen for name, seen in figures.items() if seen > BOUND} == {}
