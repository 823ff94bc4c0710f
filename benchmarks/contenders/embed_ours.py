"""Our worker: documents whose chunks are stored, led until they are searchable, by the real steps."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid4

import asyncpg

from benchmarks.contenders import until_drained
from benchmarks.contenders.embed_texts import BATCH, MODEL, Race, made_texts
from benchmarks.contenders.lap import Lap, measured
from benchmarks.contenders.ours import UNFINISHED
from upload_pipeline.logs import configure_logs
from upload_pipeline.settings import load_settings
from upload_workers.process import running_worker

USERS = 8
"""As many as jobs at work, so that no cap holds anybody back."""

_LOOK = 0.03  # seconds between looks whether all is done, which take of the same processors

CHUNKS = 320
"""Of a document: some 150 pages."""

_DOCUMENT = """
insert into upload_pipeline.documents (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
values ($1::uuid, $2, 'bench', 'text/plain', 1, encode(sha256($1::uuid::text::bytea), 'hex'), $1::uuid::text)
"""
_CHUNKS = """
insert into upload_pipeline.document_chunk_buffer
  (document_id, ordinal, chunk_id, user_id, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
   section_ids)
select $1, place - 1, gen_random_uuid(), $2, text, encode(sha256(text::bytea), 'hex'), 'bench@1', place * 1000,
       place * 1000 + length(text), '{}', '{}'
  from unnest($3::text[]) with ordinality t (text, place)
"""
_STORED = """
insert into upload_pipeline.document_chunks
  (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
   section_ids)
select chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
       section_ids
  from upload_pipeline.document_chunk_buffer where document_id = $1
"""
_STAGE = "update upload_pipeline.upload_jobs set stage = $1 where state = 'queued'"
_LIVE = "select count(*) from upload_pipeline.document_chunks where live"


async def run(race: Race) -> Lap:
    """From stored chunks until the last is searchable."""
    return await lead(race, "chunked")


async def lead(race: Race, stage: str) -> Lap:
    """From a stage until the last chunk is searchable: `chunked`, or `chunks_buffered` with its storing."""
    admin = await asyncpg.connect(race.url)
    texts = made_texts(race.texts)
    users = [uuid4() for _ in range(USERS)]
    warm = await _add_documents(admin, stage, [uuid4()], [["warm"]])
    parts = [texts[begin : begin + CHUNKS] for begin in range(0, len(texts), CHUNKS)]
    documents = await _add_documents(admin, stage, users, parts)
    await admin.execute("vacuum analyze")
    await admin.execute("checkpoint")
    before = await admin.fetchval(_LIVE)
    worker_url = race.url.replace("//postgres", "//upload_worker", 1)
    with TemporaryDirectory() as home:
        settings = load_settings(
            home=Path(home),
            database_url=worker_url,
            log_level="error",
            embedder="openai",
            openai_api_key=race.api_key,
            openai_base_url=race.api_url,
            openai_model=MODEL,
            openai_concurrency=race.concurrency,
            embed_batch_size=BATCH,
        )
        configure_logs(settings)
        async with running_worker(settings, worker_url, concurrency=USERS):
            await _start(admin, stage, warm)  # the first answer tells the limits
            await until_drained(admin, UNFINISHED)
            with measured() as lap:
                await _start(admin, stage, documents)
                await until_drained(admin, UNFINISHED, pause=_LOOK)
    assert await admin.fetchval(_LIVE) - before == race.texts + 1
    await admin.close()
    return lap


async def _add_documents(
    admin: asyncpg.Connection, stage: str, users: list[UUID], parts: list[list[str]]
) -> list[tuple[UUID, UUID]]:
    """A document a part, with its chunks as they are at the stage; (document, user) of each."""
    added = []
    for number, part in enumerate(parts):
        document, user = uuid4(), users[number % len(users)]
        await admin.execute(_DOCUMENT, document, user)
        await admin.execute(_CHUNKS, document, user, part)
        if stage == "chunked":
            await admin.execute(_STORED, document)
        added.append((document, user))
    return added


async def _start(admin: asyncpg.Connection, stage: str, documents: list[tuple[UUID, UUID]]) -> None:
    """Their jobs, each at the stage."""
    async with admin.transaction():
        ids, users = [document for document, _ in documents], [user for _, user in documents]
        await admin.execute("select count(*) from upload_pipeline.enqueue_jobs($1, $2)", ids, users)
        await admin.execute(_STAGE, stage)
