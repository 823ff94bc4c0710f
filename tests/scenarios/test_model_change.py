"""Another embedding model takes the place of the one in use, with searches running all the while and workers killed."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import psycopg
import pytest

from tests.sample_documents import make_document
from tests.scenarios.world import World, write_documents
from upload_pipeline import ids
from upload_pipeline.database.model_control import activate_model, add_model, retire_model
from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.errors import PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.search.query import search
from upload_pipeline.search.query_models import QueryModels

OLD, NEW = "wordllama-256", "wordllama-256@128"
PER_DOCUMENT = 20
QUERIES = (
    "moisture near the harbour",
    "who pays the mortgagee",
    "drying equipment",
    "photographs before anything was moved",
    "wear and rot are excluded",
    "burst pipe in the kitchen",
    "deductible for hail",
    "two contractors who saw the damage",
)


@dataclass
class Searches:
    """What the searches of a run came to.

    Attributes:
        by_model: how many each model answered.
        failed: what was raised.
        empty: how many found nothing.
        slowest: seconds.
    """

    done: int = 0
    failed: list[str] = field(default_factory=list)
    empty: int = 0
    slowest: float = 0.0
    by_model: Counter[str] = field(default_factory=Counter)


@dataclass
class Shelf:
    """A large user's chunks, and what exact search over them finds."""

    world: World
    user: UUID
    ids: list[UUID]
    texts: list[str]

    async def recall(self, db: BoundedPool, models: QueryModels, dimensions: int) -> float:
        """Of the ten nearest chunks that brute force finds for each query, the share that the search finds."""
        embedder = LocalEmbedder(dimensions)
        vectors = await embedder.embed(self.texts)
        queries = await embedder.embed(QUERIES)
        await embedder.close()
        found = 0
        for query, vector in zip(QUERIES, queries, strict=True):
            similarity = vectors @ vector
            tenth = np.sort(similarity)[-10]
            result = await search(db, models, user_id=self.user, query=query, mode="vector", limit=10)
            places = {chunk: place for place, chunk in enumerate(self.ids)}
            # equal texts have equal vectors, and which of them comes first is nobody's promise
            found += sum(similarity[places[hit.chunk_id]] >= tenth - 1e-6 for hit in result.hits)
        return found / (10 * len(QUERIES))


async def write_library(world: World, chunks: int) -> Shelf:
    """Documents as the pipeline leaves them, embedded by OLD: half of the chunks are one user's."""
    user, others = uuid4(), [uuid4() for _ in range(5)]
    written = "\n\n".join(make_document("md", seed, pages=3).decode() for seed in range(60))
    paragraphs = sorted({paragraph for paragraph in written.split("\n\n") if len(paragraph) > 200})
    draw = random.Random(7)
    texts = [f"{draw.choice(paragraphs)}\n\n{draw.choice(paragraphs)}" for _ in range(chunks)]
    embedder = LocalEmbedder()
    vectors = await embedder.embed(texts)
    await embedder.close()
    connection = await asyncpg.connect(world.admin_url)
    await connection.execute("select upload_pipeline.register_model($1, 'local', 256)", OLD)
    documents, rows, mine = [], [], []
    for start in range(0, chunks, PER_DOCUMENT):
        owner = user if start < chunks // 2 else others[start // PER_DOCUMENT % len(others)]
        digest = sha256(f"{owner}/{start}".encode()).hexdigest()
        document = ids.document_id(owner, digest)
        documents.append((document, owner, f"{start}.md", "text/markdown", 1, digest, f"raw/{document}"))
        for place in range(start, start + PER_DOCUMENT):
            chunk = ids.chunk_id(document, "made", place, digest)
            literal = "[" + ",".join(f"{x:.7g}" for x in vectors[place]) + "]"
            rows.append((chunk, document, owner, place - start, texts[place], "a" * 64, "made", 0, 4, [], [], literal))
            if owner == user:
                mine.append((chunk, texts[place]))
    await connection.copy_records_to_table(
        "documents",
        schema_name="upload_pipeline",
        records=documents,
        columns=["document_id", "user_id", "filename", "media_type", "file_bytes", "file_sha256", "raw_key"],
    )
    for part in range(0, chunks, 5000):
        await connection.executemany(
            """
            insert into upload_pipeline.document_chunks
              (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
               heading_path, section_ids, embed_model, embedding, live)
            values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'wordllama-256', $12::text::extensions.vector, true)
            """,
            rows[part : part + 5000],
        )
    await connection.execute(
        "update upload_pipeline.documents set chunk_count = $1, embed_model = $2, searchable_at = now()",
        PER_DOCUMENT,
        OLD,
    )
    await connection.execute("analyze")
    await connection.close()
    return Shelf(world, user, [chunk for chunk, _ in mine], [text for _, text in mine])


async def search_on(db: BoundedPool, models: QueryModels, user: UUID, told: Searches, seed: int) -> None:
    """Searches without end."""
    draw = random.Random(seed)
    while True:
        began = time.perf_counter()
        mode = draw.choice(("vector", "hybrid"))
        try:
            result = await search(db, models, user_id=user, query=draw.choice(QUERIES), mode=mode)
        except Exception as error:  # noqa: BLE001 - counted, and asserted on
            told.failed.append(repr(error))
        else:
            told.empty += not result.hits
            told.by_model[(await models.current()).name] += 1
        told.done += 1
        told.slowest = max(told.slowest, time.perf_counter() - began)
        await asyncio.sleep(0.01)


async def until(connection: asyncpg.Connection, condition: str, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not await connection.fetchval(f"select {condition}"):
            await asyncio.sleep(0.1)


FILLED = f"(select lacking_chunks = 0 from upload_pipeline.model_overview where model = '{NEW}')"

WRITE_HALF = """
    select document_id, chunk_count from upload_pipeline.documents where user_id = $1
     order by document_id limit (select count(*) / 2 from upload_pipeline.documents where user_id = $1)
       for no key update
"""
AWAY = f"""
    select count(*)
      from upload_pipeline.document_chunks c
      join upload_pipeline.chunk_vectors s on s.chunk_id = c.chunk_id and s.embed_model = '{NEW}'
     where c.live and c.user_id = $1 and c.embed_model = '{OLD}'
"""


@pytest.mark.parametrize("chunks", [1200, pytest.param(20_000, marks=pytest.mark.slow)])
async def test_a_model_takes_anothers_place_while_searches_go_on(world: World, chunks: int) -> None:
    began = time.monotonic()
    shelf = await write_library(world, chunks)
    world.environment["UPLOAD_PIPELINE_EMBED_BATCH_SIZE"] = "16"
    admin = await asyncpg.connect(world.admin_url)
    db = await open_pool(world.worker_url, size=5)
    models = QueryModels(db, ProviderCalls(), world.settings)
    figures: dict[str, Any] = {"recall before": await shelf.recall(db, models, 256)}
    told = Searches()
    searching = [asyncio.create_task(search_on(db, models, shelf.user, told, seed)) for seed in range(3)]
    figures["made"] = time.monotonic() - began
    victim = world.start_worker()
    world.start_worker()

    operator = psycopg.connect(world.worker_url, autocommit=True)
    assert add_model(operator, model=NEW, provider="local", dimensions=128, paused=False) == "building"
    filling = time.monotonic()
    with pytest.raises(PipelineError, match="have no vector of"):
        await asyncio.to_thread(activate_model, operator, NEW, grace=timedelta(days=1))

    # files arrive meanwhile, and a worker is killed in the middle
    arriving = asyncio.create_task(
        world.ingest([(path, shelf.user) for path in write_documents(world.home / "files", 5)])
    )
    await until(admin, f"(select count(*) > {chunks // 4} from upload_pipeline.chunk_vectors)", 300)
    victim.send_signal(signal.SIGKILL)
    world.start_worker()
    assert len(await arriving) == 5
    await until(admin, "not exists (select from upload_pipeline.upload_jobs where finished_at is null)", 600)
    await until(admin, FILLED, 60)
    figures["filled"] = time.monotonic() - filling
    assert told.by_model.keys() == {OLD}

    mine = await admin.fetch(
        "select chunk_id, text from upload_pipeline.document_chunks where live and user_id = $1 order by chunk_id",
        shelf.user,
    )
    assert len(mine) > len(shelf.ids)
    shelf = Shelf(world, shelf.user, [row["chunk_id"] for row in mine], [row["text"] for row in mine])
    writer = await asyncpg.connect(world.admin_url)
    async with writer.transaction():
        # no vector comes home to a document that is being written, as half of the user's are
        written = sum(row["chunk_count"] for row in await writer.fetch(WRITE_HALF, shelf.user))
        activating = time.monotonic()
        assert await asyncio.to_thread(activate_model, operator, NEW, grace=timedelta(days=1)) == OLD
        figures["activated"] = time.monotonic() - activating
        figures["recall at once"] = await shelf.recall(db, models, 128)
        async with asyncio.timeout(120):
            while await admin.fetchval(AWAY, shelf.user) != written:
                await asyncio.sleep(0.1)
        assert 0.3 < written / len(mine) < 0.7
        figures["recall on the way"] = await shelf.recall(db, models, 128)
        assert await admin.fetchval(AWAY, shelf.user) == written
    await writer.close()
    await until(admin, f"not exists (select from upload_pipeline.document_chunks where embed_model = '{OLD}')", 300)
    figures["settled"] = time.monotonic() - activating
    before = told.by_model[NEW]
    async with asyncio.timeout(60):
        while told.by_model[NEW] < before + 20:
            await asyncio.sleep(0.05)
    figures["recall after"] = await shelf.recall(db, models, 128)

    # the old vectors go when they are told to, and nothing of it shows
    await asyncio.to_thread(retire_model, operator, OLD, now=True)
    operator.close()
    await until(admin, "not exists (select from upload_pipeline.chunk_vectors)", 300)
    figures["recall at the end"] = await shelf.recall(db, models, 128)
    for task in searching:
        task.cancel()
    ended = await asyncio.gather(*searching, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended)
    await models.close()
    await db.close()

    states = await admin.fetch("select pipeline, state::text, count(*) from upload_pipeline.upload_jobs group by 1, 2")
    await admin.close()
    print(f"{chunks} chunks: {figures} {told} {sorted(map(tuple, states))} {time.monotonic() - began:.1f} s")
    assert told.failed == []
    assert told.empty == 0
    assert told.done > 100
    assert {row["state"] for row in states} == {"done"}
    recalls = {moment: share for moment, share in figures.items() if moment.startswith("recall")}
    assert len(recalls) == 5
    assert min(recalls.values()) >= 0.95, recalls
