"""A world whose texts are embedded by the OpenAI simulator, and what is asked of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import asyncpg

from tests.scenarios.world import World
from tests.simulators.openai_embeddings import OpenAISimulator

DIMENSIONS = 32


async def rows(world: World, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(world.admin_url)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def needed(world: World) -> Counter[str]:
    """How often each text has to be paid for: once for each user who has it, in however many chunks."""
    chunks = await rows(world, "select distinct user_id, text from upload_pipeline.document_chunks")
    return Counter(chunk["text"] for chunk in chunks)


async def paid_more_than_needed(world: World, simulator: OpenAISimulator) -> dict[str, int]:
    """Texts that were paid for more often than users have them and their answers were lost."""
    live = await rows(world, "select distinct text from upload_pipeline.document_chunks where live")
    books, texts = simulator.books, await needed(world)
    assert {row["text"] for row in live} <= set(books.paid)
    return {text: times for text, times in books.paid.items() if times > texts[text] + books.lost[text]}


async def run_command(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **world.environment,
        "UPLOAD_PIPELINE_HOME": str(world.home),
        "UPLOAD_PIPELINE_DATABASE_URL": world.worker_url,
    }
    command = [str(Path(sys.executable).parent / "upload-pipeline"), *arguments]
    return await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
