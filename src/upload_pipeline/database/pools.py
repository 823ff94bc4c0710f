"""Pools of connections for workers, intake and search."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncpg

from upload_pipeline.database.connection import (
    ConnectionOptions,
    asyncpg_arguments,
    open_bounded,
    prepare_connection,
)

if TYPE_CHECKING:
    from asyncpg.pool import PoolAcquireContext

_IDLE_SECONDS = 300.0
_RELEASE_SECONDS = 2.0
_QUERIES_PER_CONNECTION = 50_000


class BoundedPool(asyncpg.Pool):  # type: ignore[misc]
    """A pool that waits for a free connection only so long; asyncpg's own waits for ever."""

    # Slots, as asyncpg's own pool has them.
    __slots__ = ("_acquire_timeout",)

    def __init__(self, *, acquire_timeout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._acquire_timeout = acquire_timeout

    def acquire(self, *, timeout: float | None = None) -> PoolAcquireContext:
        """A connection, as of `asyncpg.Pool.acquire`; `TimeoutError` where none is free within the pool's bound."""
        return super().acquire(timeout=self._acquire_timeout if timeout is None else timeout)

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's own
        """Takes a connection back, as `asyncpg.Pool.release`; one whose server does not answer is ended soon.

        After a statement that was cancelled or timed out, asyncpg waits for the server to confirm that, for as long
        as one may wait for a connection. Over a dead socket that held up a cancelled task for most of a minute.
        """
        # The connection has been ended when this is raised. Passed on, it would take the place of the cancellation.
        with suppress(TimeoutError):
            await super().release(connection, timeout=_RELEASE_SECONDS if timeout is None else timeout)


async def open_pool(url: str, options: ConnectionOptions | None = None, *, size: int = 10) -> BoundedPool:
    """Opens a pool. Each connection knows pgvector's types and has the bounds of `options`.

    A connection goes back as it is, without the round trip that asyncpg spends on `reset all`: an open transaction
    is rolled back and listeners are removed, but session settings and session locks would stay. Set what you set by
    `set local`, lock by transaction.

    Args:
        url: of the database.
        options: bounds and name.
        size: most connections at once.

    Raises:
        PipelineError: `SETTING_INVALID` for a bad URL, `DATABASE_UNAVAILABLE` where the database cannot be reached,
            `MIGRATIONS_PENDING` where its schema has not been made.
    """
    options = options or ConnectionOptions()

    async def attempt() -> BoundedPool:
        pool = BoundedPool(
            acquire_timeout=options.connect_timeout + options.statement_timeout,
            min_size=1,
            max_size=size,
            max_queries=_QUERIES_PER_CONNECTION,
            max_inactive_connection_lifetime=_IDLE_SECONDS,
            init=prepare_connection,
            reset=_keep_session,
            loop=None,
            connection_class=asyncpg.Connection,
            record_class=asyncpg.Record,
            **asyncpg_arguments(url, options),
        )
        await pool
        return pool

    opened: BoundedPool = await open_bounded(url, options, attempt)
    return opened


async def _keep_session(connection: asyncpg.Connection) -> None:
    """Nothing to do: asyncpg has rolled back and removed listeners before it calls this."""
