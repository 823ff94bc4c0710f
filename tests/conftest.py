"""What many tests stand on: a real Postgres of the run's own, a fresh migrated database for each test, the corpus."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import psycopg
import pytest
import structlog
from clamd_server import running_clamd
from hypothesis import settings
from postgres_servers import FAST, Database, remove_servers_of_dead_runs, temporary_home
from psycopg import sql
from s3_servers import S3Server, running_s3_server

from upload_pipeline.database.connection import connect
from upload_pipeline.database.embedded import EmbeddedDatabase, ensure_embedded
from upload_pipeline.database.migrations import apply_migrations

# A busy machine is no failure, and a run that passed passes again: the same examples each time.
settings.register_profile("patient", deadline=None, derandomize=True)
# Other examples each time, to look for what nobody has thought of: `scripts/test --hypothesis-profile exploring`.
settings.register_profile("exploring", deadline=None)
settings.load_profile("patient")

# Tracebacks without local variables: with them one takes seconds.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

ROOT = Path(__file__).parents[1]
CORPUS = ROOT.parent / "shared" / "corpus"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives long runs their time."""
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedDatabase]:
    """A server for this run of the tests, gone at its end."""
    remove_servers_of_dead_runs()
    with temporary_home() as home:
        yield ensure_embedded(home, FAST)


@pytest.fixture(scope="session")
def server_admin(postgres_server: EmbeddedDatabase) -> Iterator[psycopg.Connection]:
    """The superuser of the run's server, connected to a database that no test uses."""
    with psycopg.connect(postgres_server.url("postgres", "postgres"), autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def template_database(postgres_server: EmbeddedDatabase) -> str:
    """Name of a migrated database for tests to copy; nobody connects to it."""
    apply_migrations(postgres_server.admin_url)
    return "upload_pipeline"


@pytest.fixture(scope="session")
def database_names() -> Iterator[str]:
    """Names for the databases of this run."""
    return (f"test_{number}" for number in itertools.count(1))


@pytest.fixture(scope="session")
def used_databases() -> list[str]:
    """Names of the databases whose tests are over, to be dropped."""
    return []


@pytest.fixture
def database(
    postgres_server: EmbeddedDatabase,
    server_admin: psycopg.Connection,
    template_database: str,
    database_names: Iterator[str],
    used_databases: list[str],
) -> Iterator[Database]:
    """A migrated database of the test's own, empty of documents and jobs."""
    name = next(database_names)
    yield from _temporary_database(postgres_server, server_admin, name, template_database, used_databases)


@pytest.fixture
def second_database(
    postgres_server: EmbeddedDatabase,
    server_admin: psycopg.Connection,
    template_database: str,
    database_names: Iterator[str],
    used_databases: list[str],
) -> Iterator[Database]:
    """Another one like `database`, for tests that compare two."""
    name = next(database_names)
    yield from _temporary_database(postgres_server, server_admin, name, template_database, used_databases)


@pytest.fixture
def empty_database(
    postgres_server: EmbeddedDatabase,
    server_admin: psycopg.Connection,
    database_names: Iterator[str],
    used_databases: list[str],
) -> Iterator[Database]:
    """A database of the test's own with nothing in it at all; the server's roles are there nevertheless."""
    yield from _temporary_database(postgres_server, server_admin, next(database_names), "template0", used_databases)


@pytest.fixture
async def admin(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """The owner of the test database's schema, through asyncpg."""
    connection = await connect(database.admin_url)
    yield connection
    await connection.close()


@pytest.fixture
async def worker(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """Role `upload_worker` on the test database, through asyncpg."""
    connection = await connect(database.worker_url)
    yield connection
    await connection.close()


@pytest.fixture(scope="session")
def clamd_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real virus scanner that knows one harmless signature of ours; without one here, the test is left out."""
    with running_clamd(tmp_path_factory.mktemp("clamd")) as url:
        yield url


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real files; tests that need it are left out where it is not."""
    if not (CORPUS / "MANIFEST.csv").is_file():
        pytest.skip(f"the corpus is not here: there is no {CORPUS / 'MANIFEST.csv'}")
    return CORPUS


def _temporary_database(
    server: EmbeddedDatabase, server_admin: psycopg.Connection, name: str, template: str, used: list[str]
) -> Iterator[Database]:
    # Not at the end of their own tests: connections that are just closing would be waited for, a tenth of a second.
    while used:
        server_admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(used.pop())))
    # Copying files, not logging pages: faster where nothing is synced.
    server_admin.execute(
        sql.SQL("create database {} template {} strategy file_copy").format(
            sql.Identifier(name), sql.Identifier(template)
        )
    )
    yield Database(name=name, admin_url=server.url("postgres", name), worker_url=server.url("upload_worker", name))
    used.append(name)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server that speaks S3, for this run of the tests."""
    with running_s3_server() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket of the test's own, which this process has the keys to."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid4()}"
    s3_server.make_bucket(name)
    return name
