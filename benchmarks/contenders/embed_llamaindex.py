"""LlamaIndex's `IngestionPipeline` with `OpenAIEmbedding` and `PGVectorStore`, set for throughput.

Asynchronous, as many requests at once and texts in a request as the others; its own cache, which is not durable by
itself, off; a table without an index of the vectors and without full text.
"""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import asyncpg
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.vector_stores.postgres import PGVectorStore
from sqlalchemy.engine import URL

from benchmarks.contenders.embed_texts import BATCH, DIMENSIONS, MODEL, Race, made_texts
from benchmarks.contenders.lap import Lap, measured


async def run(race: Race) -> Lap:
    """Until all rows are committed, in a database of its own on the same server."""
    name = f"llamaindex_{uuid4().hex[:8]}"
    admin = await asyncpg.connect(race.url)
    await admin.execute(f"create database {name}")
    await admin.execute("checkpoint")
    await admin.close()
    parts = urlsplit(race.url)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}

    def address(driver: str) -> URL:
        return URL.create(driver, username=parts.username, database=name, query=query)

    store = PGVectorStore.from_params(
        connection_string=address("postgresql+psycopg2"),
        async_connection_string=address("postgresql+asyncpg"),
        embed_dim=DIMENSIONS,
    )
    store._initialize()
    embedding = OpenAIEmbedding(
        model=MODEL,
        api_key=race.api_key,
        api_base=race.api_url,
        embed_batch_size=BATCH,
        num_workers=race.concurrency,
    )
    pipeline = IngestionPipeline(transformations=[embedding], vector_store=store, disable_cache=True)
    await embedding.aget_text_embedding("warm")
    nodes = [TextNode(text=text) for text in made_texts(race.texts)]
    with measured() as lap:
        await pipeline.arun(nodes=nodes)
    await store.close()
    stored = await asyncpg.connect(race.url, database=name)
    assert await stored.fetchval("select count(*) from data_llamaindex where embedding is not null") == race.texts
    await stored.close()
    return lap
