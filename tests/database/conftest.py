"""Connections to a migrated database of the test's own, in the two roles that its tests speak as."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
from budget_verbs import at
from model_verbs import OLD
from psycopg.rows import namedtuple_row
from session_verbs import open_session
from sessions import Connect, Connection
from verbs import add_job, claim_one, set_clock

from upload_pipeline.database.connection import connect as open_connection


def _open(url: str, opened: list[Connection]) -> Connection:
    connection: Connection = psycopg.connect(url, autocommit=True, row_factory=namedtuple_row)  # type: ignore[arg-type]
    opened.append(connection)
    return connection


@pytest.fixture
def connections() -> Iterator[list[Connection]]:
    """Every connection that the test has opened; closed at its end."""
    opened: list[Connection] = []
    yield opened
    for connection in opened:
        connection.close()


@pytest.fixture
def admin(database: Any, connections: list[Connection]) -> Connection:
    """The schema's owner, for what no verb does."""
    return _open(database.admin_url, connections)


@pytest.fixture
def connect(database: Any, connections: list[Connection]) -> Connect:
    """Opens one more connection as role `upload_worker`."""
    return lambda: _open(database.worker_url, connections)


@pytest.fixture
def worker(connect: Connect) -> Connection:
    """Role `upload_worker`: what every verb is called as."""
    return connect()


@pytest.fixture
def other(connect: Connect) -> Connection:
    """A second worker, with the same clock as the first."""
    connection = connect()
    set_clock(connection)
    return connection


@pytest.fixture
def session(worker: Connection) -> Any:
    """A session whose token is `t`."""
    return open_session(worker, "t")


@pytest.fixture
def lease(admin: Connection, worker: Connection) -> Any:
    """The one job there is, claimed at second 0."""
    set_clock(worker)
    add_job(admin, worker)
    return claim_one(worker)


@pytest.fixture
def old(worker: Connection) -> None:
    """OLD is the active model."""
    set_clock(worker)
    worker.execute("select upload_pipeline.register_model(%s, 'test', 3)", [OLD])


@pytest.fixture
async def budget_db(database: Any) -> AsyncIterator[asyncpg.Connection]:
    """Role `upload_worker`, at second 0."""
    db = await open_connection(database.worker_url)
    await at(db, 0)
    yield db
    await db.close()
