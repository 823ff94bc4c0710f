from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import numpy as np
import pytest
from postgres_servers import Database

from upload_pipeline.database.connection import ConnectionOptions
from upload_pipeline.database.embedded import EmbeddedDatabase
from upload_pipeline.database.pools import open_pool
from upload_pipeline.errors import PipelineError


async def test_vectors_go_to_the_database_and_back(database: Database) -> None:
    vector = np.array([0.5, -1.0, 2.0], dtype=np.float32)
    # as the owner: the worker's role has no right to the type's name, and needs none to hand vectors to the verbs
    async with await open_pool(database.admin_url) as pool:
        back = await pool.fetchval("select $1::extensions.vector", vector)

    assert back.to_numpy().tolist() == vector.tolist()


async def test_every_connection_of_the_pool_has_the_bounds(database: Database) -> None:
    options = ConnectionOptions(lock_timeout=1.5)
    async with (
        await open_pool(database.worker_url, options, size=2) as pool,
        pool.acquire() as one,
        pool.acquire() as two,
    ):
        assert [await each.fetchval("show lock_timeout") for each in (one, two)] == ["1500ms", "1500ms"]


async def test_waiting_for_a_connection_has_a_bound(database: Database) -> None:
    options = ConnectionOptions(connect_timeout=0.5, statement_timeout=0)
    async with await open_pool(database.worker_url, options, size=1) as pool, pool.acquire():
        with pytest.raises(TimeoutError):
            await pool.fetchval("select 1")


async def test_statement_ends_at_its_bound(database: Database) -> None:
    async with await open_pool(database.worker_url, ConnectionOptions(statement_timeout=0.1)) as pool:
        with pytest.raises(asyncpg.QueryCanceledError):
            await pool.execute("select pg_sleep(5)")
        assert await pool.fetchval("select 1") == 1


async def test_open_transaction_does_not_reach_the_next_user(database: Database) -> None:
    async with await open_pool(database.worker_url, size=1) as pool:
        async with pool.acquire() as connection:
            await connection.execute("begin")
            await connection.execute("set local role authenticated")
            await connection.execute("select set_config('request.jwt.claims', '{\"sub\": \"x\"}', true)")
        assert await pool.fetchval("select current_user") == "upload_worker"
        assert await pool.fetchval("select coalesce(current_setting('request.jwt.claims', true), '')") == ""


async def test_connection_that_was_cut_is_replaced(database: Database, postgres_server: EmbeddedDatabase) -> None:
    admin = await asyncpg.connect(postgres_server.url("postgres", "postgres"))
    async with await open_pool(database.worker_url, size=1) as pool:
        pid = await pool.fetchval("select pg_backend_pid()")
        await admin.execute("select pg_terminate_backend($1, 5000)", pid)
        for _ in range(2):
            # asyncpg notices the cut before the statement, or the statement fails by it: at most one does.
            with contextlib.suppress(
                asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError
            ):
                now = await pool.fetchval("select pg_backend_pid()")
        assert now != pid
    await admin.close()


async def test_pool_never_holds_more_than_its_size(database: Database) -> None:
    async with await open_pool(database.worker_url, ConnectionOptions(application_name="counted"), size=3) as pool:
        await asyncio.gather(*(pool.execute("select pg_sleep(0.02)") for _ in range(12)))

        count = await pool.fetchval("select count(*) from pg_stat_activity where application_name = 'counted'")
    assert count == 3


async def test_pool_that_could_not_open_leaves_no_connection(empty_database: Database) -> None:
    with pytest.raises(PipelineError, match="upload-pipeline migrate"):
        await open_pool(empty_database.admin_url, ConnectionOptions(application_name="left"))

    admin = await asyncpg.connect(empty_database.admin_url)
    while await admin.fetchval("select count(*) from pg_stat_activity where application_name = 'left'"):
        await asyncio.sleep(0.01)
    await admin.close()
