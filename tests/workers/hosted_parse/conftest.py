"""A provider, and documents for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hosted_line import (
    PAGES,
    PDF,
    TIMEOUT,
    TTL,
    USER,
    Line,
    OpenLine,
    accept,
    step_context,
)

from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator
from upload_pipeline.database import queue
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.queue import Advance
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.settings import load_settings
from upload_workers.hosted_parse import HostedParser


@pytest.fixture
async def simulator() -> AsyncIterator[LlamaCloudSimulator]:
    async with LlamaCloudSimulator() as simulator:
        yield simulator


@pytest.fixture(scope="module")
def parser() -> Any:
    parser = LocalParser(60.0, 1024**3)
    yield parser
    parser.close()


@pytest.fixture
async def open_line(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, parser: LocalParser, simulator: LlamaCloudSimulator
) -> AsyncIterator[OpenLine]:
    """Puts a document in the store, and its job at `job_validated`."""
    settings = load_settings(
        home=tmp_path,
        database_url=database.worker_url,
        parser="llamaparse",
        llamaparse_api_key=KEY,
        llamaparse_base_url=simulator.url,
        llamaparse_timeout=TIMEOUT,
        llamaparse_requests_per_minute=1000,
        prices={"llamaparse/cost_effective/2026-09-28": {"credits": 1.25}},
    )
    pool = await open_pool(database.worker_url, connection_options(settings), size=3)
    opened: list[HostedParser] = []

    async def begin(content: bytes = PAGES, media_type: str = PDF, user: UUID = USER, **changed: object) -> Line:
        context = await step_context(pool, settings.model_copy(update=changed), parser)
        if context.hosted_parser is not None:
            opened.append(context.hosted_parser)
        document = await accept(pool, context.store, content, media_type, user)
        (job,) = await queue.claim_jobs(pool, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL)
        asked = Advance(job.lease, "queued", "job_validated", True)
        await queue.advance_jobs(pool, [asked], ttl=TTL)
        return Line(context, admin, simulator, document, replace(job, stage="job_validated"))

    yield begin
    for hosted in opened:
        await hosted.close()
    await pool.close()
