from __future__ import annotations

import asyncio
import contextlib
import socket
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from postgres_servers import Database

from upload_pipeline.database.connection import (
    ConnectionOptions,
    connect,
    connect_sync,
    connection_options,
    describe_url,
)
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.urls import DatabaseUrls, resolve_database
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import load_settings

SECRET = "hunter2"

NO_URLS = [
    "",
    "mysql://u:hunter2@h/d",
    "host=h password=hunter2",
    "postgresql://u:hun@ter2@h/d",
    "postgresql://u:hun/ter2@h/d",
    "postgresql://u:hun?ter2@h/d",
    "postgresql://u:hunter2@h/d?nonsense=1",
    "postgresql://u:hunter2@h:port/d",
    "postgresql://u:%zz@h/d",
]

Open = Callable[[str, ConnectionOptions], Awaitable[object]]


async def open_sync(url: str, options: ConnectionOptions) -> object:
    return await asyncio.to_thread(connect_sync, url, options)


async def open_a_pool(url: str, options: ConnectionOptions) -> object:
    return await open_pool(url, options)


EVERY_WAY = pytest.mark.parametrize("open_one", [connect, open_sync, open_a_pool])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose owner takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("url", "described"),
    [
        ("postgresql://u:hunter2@h:6543/d", 'database "d" on h:6543 as u'),
        ("postgres://u:hun%40ter2@h/d?sslmode=require", 'database "d" on h as u'),
        ("postgresql://u@/d?host=%2Ftmp%2Fx&port=5432", 'database "d" on /tmp/x as u'),
        ("postgresql://u:hunter2@h", 'database "u" on h as u'),
    ],
)
def test_url_is_described_without_its_password(url: str, described: str) -> None:
    assert describe_url(url) == described


@pytest.mark.parametrize("url", NO_URLS)
@EVERY_WAY
async def test_bad_url_is_refused_without_a_piece_of_it(open_one: Open, url: str) -> None:
    with pytest.raises(PipelineError, match="is not one of Postgres") as caught:
        await open_one(url, ConnectionOptions())

    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert "ter2" not in caught.value.message


@EVERY_WAY
async def test_refused_connection_names_the_place_and_not_the_password(open_one: Open, closed_port: int) -> None:
    with pytest.raises(PipelineError) as caught:
        await open_one(f"postgresql://ann:{SECRET}@127.0.0.1:{closed_port}/papers", ConnectionOptions())

    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert f'database "papers" on 127.0.0.1:{closed_port} as ann' in caught.value.message
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert SECRET not in shown


@EVERY_WAY
async def test_silent_server_is_given_up(open_one: Open, silent_port: int) -> None:
    with pytest.raises(PipelineError) as caught:
        await open_one(f"postgresql://u:{SECRET}@127.0.0.1:{silent_port}/d", ConnectionOptions(connect_timeout=0.3))

    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE


@EVERY_WAY
async def test_missing_database_and_missing_schema_are_told_apart(open_one: Open, empty_database: Database) -> None:
    with pytest.raises(PipelineError, match='"no_such" does not exist') as caught:
        await open_one(empty_database.admin_url.replace(empty_database.name, "no_such"), ConnectionOptions())
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE

    if open_one is not open_sync:
        with pytest.raises(PipelineError, match="upload-pipeline migrate") as caught:
            await open_one(empty_database.admin_url, ConnectionOptions())
        assert caught.value.code is ErrorCode.MIGRATIONS_PENDING


async def test_full_server_is_asked_again_until_a_place_is_free(database: Database) -> None:
    url, options = database.worker_url, ConnectionOptions(connect_timeout=20)
    with psycopg.connect(database.admin_url, autocommit=True) as admin:
        admin.execute(f"alter database {database.name} connection limit 2".encode())
        held = await connect(url, options)
        with pytest.raises(PipelineError, match="too many connections"):
            await connect(url, ConnectionOptions(connect_timeout=0.3))
        opening = asyncio.ensure_future(connect(url, options))
        opening_sync = asyncio.ensure_future(open_sync(url, options))
        await asyncio.sleep(0.5)
        assert not opening.done()
        admin.execute(f"alter database {database.name} connection limit -1".encode())
        for connection in (held, await opening):
            await connection.close()
        with contextlib.closing(await opening_sync):  # type: ignore[type-var]
            pass


async def test_session_has_the_bounds_that_the_settings_state(database: Database) -> None:
    settings = load_settings(statement_timeout=12.5, lock_timeout=3, idle_transaction_timeout=4, _env_file=None)
    options = connection_options(settings, "upload-pipeline test")
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "jit", "application_name"]
    query = f"select {', '.join(f'current_setting({name!r})' for name in names)}"
    expected = ("12500ms", "3s", "4s", "off", "upload-pipeline test")

    connection = await connect(database.worker_url, options)
    assert tuple(await connection.fetchrow(query)) == expected
    await connection.close()
    with connect_sync(database.worker_url, options) as sync:
        assert sync.execute(query.encode()).fetchone() == expected


async def test_options_in_the_url_stay(database: Database) -> None:
    url = f"{database.worker_url}&options=-c%20work_mem%3D5MB"

    connection = await connect(url)
    assert await connection.fetchval("show work_mem") == "5MB"
    assert await connection.fetchval("show lock_timeout") == "5s"
    await connection.close()
    with connect_sync(url) as sync:
        assert sync.execute("select current_setting('work_mem'), current_setting('lock_timeout')").fetchone() == (
            "5MB",
            "5s",
        )


async def test_behind_a_pooler_nothing_is_prepared_and_no_bound_is_sent(database: Database) -> None:
    options = ConnectionOptions(transaction_pooler=True)
    prepared = "select count(*) from pg_prepared_statements"

    connection = await connect(database.worker_url, options)
    for _ in range(10):
        await connection.fetchval("select $1::int", 1)
    assert await connection.fetchval(prepared) == 0
    assert await connection.fetchval("show statement_timeout") == "0"
    await connection.close()
    with connect_sync(database.worker_url, options) as sync:
        for _ in range(10):
            sync.execute("select %s::int", [1])
        assert sync.execute(prepared.encode()).fetchone() == (0,)
        assert sync.execute("show statement_timeout").fetchone() == ("0",)


def test_urls_of_one_database_show_no_password() -> None:
    settings = load_settings(
        database_url=f"postgresql://w:{SECRET}@h/d",
        migration_database_url=f"postgresql://o:{SECRET}@h/d",
        _env_file=None,
    )

    urls = resolve_database(settings)

    assert (urls.worker, urls.admin) == (f"postgresql://w:{SECRET}@h/d", f"postgresql://o:{SECRET}@h/d")
    assert SECRET not in repr(urls) + str(urls) + repr(settings)


def test_migrations_use_the_workers_url_where_no_other_is_set() -> None:
    url = "postgresql://w@h/d"

    assert resolve_database(load_settings(database_url=url, _env_file=None)) == DatabaseUrls(url, url, embedded=False)


@pytest.mark.parametrize("name", ["database_url", "migration_database_url"])
def test_bad_url_in_the_settings_is_refused_at_once(name: str) -> None:
    values: dict[str, Any] = {"database_url": "postgresql://w@h/d", name: "mysql://h"}

    with pytest.raises(PipelineError, match="is not one of Postgres") as caught:
        resolve_database(load_settings(_env_file=None, **values))
    assert caught.value.message.startswith(f"UPLOAD_PIPELINE_{name.upper()} is not allowed: ")
