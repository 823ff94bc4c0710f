"""The user's transaction: whose it is while it is open, and that its connection goes back as it came, come what may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest
from postgres_servers import Database

from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.pools import BoundedPool, open_pool

WHO = "select current_user::text, nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'"
NOTES = "create table public.notes (note text); grant insert on public.notes to authenticated"
USER = UUID("6f0b1a50-1f6e-4c55-9f8f-0d3c9a6f2b11")


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[BoundedPool]:
    """One connection, so that what one block leaves behind the next one meets."""
    opened = await open_pool(database.worker_url, size=1)
    yield opened
    await opened.close()


async def _is_as_it_came(pool: BoundedPool) -> bool:
    async with pool.acquire() as connection:
        return tuple(await connection.fetchrow(WHO)) == ("upload_worker", None) and not connection.is_in_transaction()


async def test_the_block_is_the_users_and_what_follows_is_not(pool: BoundedPool) -> None:
    for user in (USER, uuid4()):
        async with as_user(pool, user) as connection:
            assert tuple(await connection.fetchrow(WHO)) == ("authenticated", str(user))
        assert await _is_as_it_came(pool)


@pytest.mark.parametrize("by_index", [False, True])
async def test_a_page_is_walked_by_its_index_only_where_asked(pool: BoundedPool, by_index: bool) -> None:
    async with as_user(pool, USER, by_index=by_index) as connection:
        assert await connection.fetchval("show enable_seqscan") == ("off" if by_index else "on")
    async with pool.acquire() as connection:
        assert await connection.fetchval("show enable_seqscan") == "on"


async def test_nothing_can_be_written_unless_it_is_asked_for(pool: BoundedPool, admin: psycopg.Connection) -> None:
    admin.execute(NOTES)
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        async with as_user(pool, USER) as connection:
            await connection.execute("insert into public.notes values ('no')")
    assert await _is_as_it_came(pool)
    async with as_user(pool, USER, readonly=False) as connection:
        await connection.execute("insert into public.notes values ('yes')")
    assert admin.execute("select note from public.notes").fetchall() == [("yes",)]


async def test_an_error_in_the_block_undoes_it_and_goes_on(pool: BoundedPool, admin: psycopg.Connection) -> None:
    admin.execute(NOTES)

    async def write_and_fail() -> None:
        async with as_user(pool, USER, readonly=False) as connection:
            await connection.execute("insert into public.notes values ('undone')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await write_and_fail()
    assert await _is_as_it_came(pool)
    assert admin.execute("select note from public.notes").fetchall() == []


async def test_a_cancelled_statement_leaves_a_connection_that_serves(pool: BoundedPool) -> None:
    async def sleep() -> None:
        async with as_user(pool, USER) as connection:
            await connection.execute("select pg_sleep(30)")

    task = asyncio.create_task(sleep())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _is_as_it_came(pool)


async def test_a_connection_that_dies_in_the_block_says_so_and_the_next_one_serves(
    pool: BoundedPool, admin: psycopg.Connection
) -> None:

    async def ask_the_dead() -> None:
        async with as_user(pool, USER) as connection:
            admin.execute("select pg_terminate_backend(%s)", (connection.get_server_pid(),))
            await connection.fetchval("select 1")

    with pytest.raises((asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError)):
        await ask_the_dead()
    assert await _is_as_it_came(pool)


async def test_a_user_id_cannot_carry_sql(pool: BoundedPool) -> None:
    evil = "6f0b1a50'; set role postgres; select '"
    async with as_user(pool, evil) as connection:  # type: ignore[arg-type]
        assert tuple(await connection.fetchrow(WHO)) == ("authenticated", evil)
