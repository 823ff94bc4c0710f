"""What the routes of one process share: connections, store, providers, and who may call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import asyncpg
from fastapi import Depends, Request

from upload_pipeline.api.job_feed import JobFeed, running_feed
from upload_pipeline.api.open_streams import OpenStreams
from upload_pipeline.api.tokens import TokenVerifier, open_token_verifier
from upload_pipeline.database.connection import connect, connection_options
from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.intake.admission import Admissions
from upload_pipeline.intake.staging import Intake
from upload_pipeline.providers.calls import MeasuredParser, ProviderCalls
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.search.query_models import QueryModels
from upload_pipeline.settings import Settings
from upload_pipeline.storage.configured import configured_store
from upload_pipeline.storage.signed_urls import UrlSigner, open_signer
from upload_pipeline.storage.store import ObjectStore
from upload_pipeline.storage.virus_scan import open_scanner

LISTENER_NAME = "upload-pipeline listen"
"""What `pg_stat_activity` calls the one connection of a process that listens."""

_CLOSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Resources:
    """What routes use.

    Attributes:
        settings: of this process.
        database_url: as role `upload_worker`, for connections outside the pool (LISTEN).
        db: pool of role `upload_worker`; what a user may see is read through `as_user`.
        store: the object store.
        query_models: who embeds queries.
        intake: takes files in.
        tokens: tells users by their tokens.
        signer: signs URLs of objects, where the store does not.
        job_feed: tells what is new of jobs that somebody watches.
        streams: counts the open streams of events.
        admissions: lets large requests in while there is room.
        provider_calls: counts and times the calls of embedders and of the parser that `intake` opens files with.
    """

    settings: Settings
    database_url: str = field(repr=False)
    db: BoundedPool
    store: ObjectStore
    query_models: QueryModels
    intake: Intake
    tokens: TokenVerifier
    signer: UrlSigner
    job_feed: JobFeed
    streams: OpenStreams
    admissions: Admissions
    provider_calls: ProviderCalls


@asynccontextmanager
async def open_resources(settings: Settings, database_url: str) -> AsyncGenerator[Resources]:
    """Opens everything that the routes need, and closes it when left.

    Args:
        settings: of this process.
        database_url: Postgres as role `upload_worker`.

    Raises:
        PipelineError: the database, the store, a provider, the check of tokens or a secret cannot be opened.
    """
    async with AsyncExitStack() as stack:
        db = await open_pool(
            database_url, connection_options(settings, "upload-pipeline serve"), size=settings.pool_size
        )
        stack.push_async_callback(_close_pool, db)
        store = configured_store(settings)
        stack.push_async_callback(store.close)
        provider_calls = ProviderCalls()
        query_models = QueryModels(db, provider_calls, settings)
        stack.push_async_callback(query_models.close)
        await query_models.start()
        local_parser = LocalParser(settings.parse_timeout, settings.parse_memory_bytes)
        stack.callback(local_parser.close)
        parser = MeasuredParser(local_parser, provider_calls)
        tokens = await stack.enter_async_context(open_token_verifier(settings))
        signer = open_signer(settings)
        listening = None
        if not settings.transaction_pooler:
            listening = partial(connect, database_url, connection_options(settings, LISTENER_NAME))
        job_feed = await stack.enter_async_context(
            running_feed(
                db,
                connect=listening,
                interval=settings.sse_interval,
                told_interval=settings.sse_listening_interval,
            )
        )
        admissions = Admissions(db, settings.max_concurrent_batch_bytes)
        stack.push_async_callback(_end, asyncio.create_task(admissions.keep()))
        yield Resources(
            settings=settings,
            database_url=database_url,
            db=db,
            store=store,
            query_models=query_models,
            intake=Intake(
                db,
                store,
                parser.inspect,
                settings.max_file_bytes,
                settings.home / "scratch",
                min_free_bytes=settings.min_free_bytes,
                scanner=open_scanner(settings.clamd_url, seconds=settings.clamd_timeout),
            ),
            tokens=tokens,
            signer=signer,
            job_feed=job_feed,
            streams=OpenStreams(of_a_user=settings.sse_streams_per_user, in_all=settings.sse_streams),
            admissions=admissions,
            provider_calls=provider_calls,
        )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _close_pool(db: BoundedPool) -> None:
    try:
        await asyncio.wait_for(db.close(), _CLOSE_SECONDS)
    except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        db.terminate()


async def _resources(request: Request) -> Resources:
    resources: Resources = request.app.state.resources
    return resources


AppResources = Annotated[Resources, Depends(_resources)]
"""A route's parameter of this type is the process's resources."""
