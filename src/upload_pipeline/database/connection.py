"""Single connections to the database, and what every connection of ours has in common: bounds, name, errors.

A URL may hold a password. No message, log line or `repr` made here shows more of it than `describe_url` does.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict

from upload_pipeline.database.vector_wire import register_vectors
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from psycopg.rows import TupleRow

    from upload_pipeline.settings import Settings

VECTOR_SCHEMA = "extensions"
"""Where pgvector lives, here as on Supabase."""

WORKER_ROLE = "upload_worker"
"""Role of workers, intake and terminal; the migrations make it."""

_COMMAND_SLACK = 5.0
_RETRY_DELAY = 0.2

# What libpq understands in a URL and asyncpg too; it takes any other word for a setting of the server.
_ASYNCPG_WORDS = (
    {"host", "port", "dbname", "user", "password", "passfile", "service", "options", "client_encoding"}
    | {"sslmode", "sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl", "sslnegotiation"}
    | {"ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs", "krbsrvname", "gsslib"}
)


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Bounds of a connection, in seconds, and its name.

    Attributes:
        application_name: shown in `pg_stat_activity`.
        connect_timeout: for the connection itself, with retries while the server starts or is full.
        statement_timeout: for one statement; 0 sets none.
        lock_timeout: for one wait for a lock; 0 sets none.
        idle_transaction_timeout: after which a transaction that does nothing is ended.
        transaction_pooler: whether a transaction pooler stands between: then nothing is prepared, and the bounds cannot
            be sent. State them on the role: `alter role upload_worker set statement_timeout = '30s'`, and likewise
            `lock_timeout`, `idle_in_transaction_session_timeout`, and `jit = off`.
    """

    application_name: str = "upload-pipeline"
    connect_timeout: float = 10.0
    statement_timeout: float = 30.0
    lock_timeout: float = 5.0
    idle_transaction_timeout: float = 30.0
    transaction_pooler: bool = False


def connection_options(settings: Settings, application_name: str = "upload-pipeline") -> ConnectionOptions:
    """The options that the settings state.

    Args:
        settings: of this process.
        application_name: what the connections are for, as in `upload-pipeline worker`.
    """
    return ConnectionOptions(
        application_name=application_name,
        connect_timeout=settings.connect_timeout,
        statement_timeout=settings.statement_timeout,
        lock_timeout=settings.lock_timeout,
        idle_transaction_timeout=settings.idle_transaction_timeout,
        transaction_pooler=settings.transaction_pooler,
    )


def describe_url(url: str) -> str:
    """Where a URL leads, without its password: `database "d" on h:5432 as u`.

    Raises:
        PipelineError: `SETTING_INVALID` where it is no Postgres URL.
    """
    parts = _parts(url)
    host = parts.get("host") or parts.get("hostaddr") or "the default host"
    port = "" if host.startswith("/") or "port" not in parts else f":{parts['port']}"
    user = f" as {parts['user']}" if "user" in parts else ""
    return f'database "{parts.get("dbname", parts.get("user", ""))}" on {host}{port}{user}'


async def connect(url: str, options: ConnectionOptions | None = None) -> asyncpg.Connection:
    """Opens one connection outside any pool, as for `LISTEN`, with pgvector's types known to it.

    Args:
        url: of the database.
        options: bounds and name.

    Raises:
        PipelineError: as `open_pool` does.
    """
    options = options or ConnectionOptions()

    async def attempt() -> asyncpg.Connection:
        connection = await asyncpg.connect(**asyncpg_arguments(url, options))
        try:
            await prepare_connection(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    return await open_bounded(url, options, attempt)


def connect_sync(
    url: str, options: ConnectionOptions | None = None, *, autocommit: bool = False
) -> psycopg.Connection[TupleRow]:
    """Opens a connection of psycopg.

    Args:
        url: of the database.
        options: bounds and name.
        autocommit: whether each statement is its own transaction.

    Raises:
        PipelineError: `SETTING_INVALID` for a bad URL, `DATABASE_UNAVAILABLE` where no connection comes about.
    """
    options = options or ConnectionOptions()
    parts: dict[str, Any] = _parts(url)
    parts["application_name"] = options.application_name
    parts["connect_timeout"] = math.ceil(options.connect_timeout)
    if not options.transaction_pooler:
        bounds = " ".join(f"-c {name}={value}" for name, value in server_bounds(options).items())
        parts["options"] = f"{parts.get('options', '')} {bounds}".strip()
    deadline = time.monotonic() + options.connect_timeout
    while True:
        try:
            return psycopg.connect(
                **parts, autocommit=autocommit, prepare_threshold=None if options.transaction_pooler else 5
            )
        except psycopg.OperationalError as error:
            # A connection that failed has no SQLSTATE in psycopg.
            passing = any(words in str(error) for words in ("is starting up", "is shutting down", "too many c"))
            if not passing or time.monotonic() + _RETRY_DELAY > deadline:
                raise unavailable(url, error) from None
        except psycopg.Error as error:
            raise unavailable(url, error) from None
        time.sleep(_RETRY_DELAY)


def asyncpg_arguments(url: str, options: ConnectionOptions) -> dict[str, Any]:
    """Keyword arguments of `asyncpg.connect` for a URL and bounds.

    Raises:
        PipelineError: `SETTING_INVALID` where it is no Postgres URL.
    """
    parts = {word: value for word, value in _parts(url).items() if word in _ASYNCPG_WORDS and value}
    settings = {"application_name": options.application_name}
    if not options.transaction_pooler:
        settings |= server_bounds(options)
    arguments: dict[str, Any] = {
        "dsn": f"postgresql://?{urlencode(parts, quote_via=quote)}",
        "timeout": options.connect_timeout,
        "command_timeout": options.statement_timeout + _COMMAND_SLACK if options.statement_timeout else None,
        "server_settings": settings,
    }
    if options.transaction_pooler:
        arguments["statement_cache_size"] = 0
    return arguments


def server_bounds(options: ConnectionOptions) -> dict[str, str]:
    """The server's settings that a session of ours has, by name; times in milliseconds."""
    return {
        "statement_timeout": str(round(options.statement_timeout * 1000)),
        "lock_timeout": str(round(options.lock_timeout * 1000)),
        "idle_in_transaction_session_timeout": str(round(options.idle_transaction_timeout * 1000)),
        # Compiling a query costs more than the short queries here take.
        "jit": "off",
    }


async def prepare_connection(connection: asyncpg.Connection) -> None:
    """Makes pgvector's types known to a new connection.

    Raises:
        PipelineError: `MIGRATIONS_PENDING` where the database has no such types.
    """
    try:
        await register_vectors(connection, schema=VECTOR_SCHEMA)
    except ValueError as error:
        raise PipelineError(
            ErrorCode.MIGRATIONS_PENDING,
            f"The database has no type {VECTOR_SCHEMA}.vector: its schema has not been made. "
            "Run `upload-pipeline migrate`.",
        ) from error


async def open_bounded(url: str, options: ConnectionOptions, attempt: Any) -> Any:
    """Awaits `attempt()`, again while the server starts or is full, within `connect_timeout`; maps its errors.

    Raises:
        PipelineError: `SETTING_INVALID` for a bad URL, `DATABASE_UNAVAILABLE` where no connection comes about.
    """
    passing: Exception | None = None
    try:
        async with asyncio.timeout(options.connect_timeout):
            while True:
                try:
                    return await attempt()
                except (asyncpg.CannotConnectNowError, asyncpg.TooManyConnectionsError) as error:
                    passing = error
                    await asyncio.sleep(_RETRY_DELAY)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
        # Without the cause: asyncpg quotes what it cannot read, which may be a part of the password.
        raise unavailable(url, passing if passing and isinstance(error, TimeoutError) else error) from None


def unavailable(url: str, error: BaseException) -> PipelineError:
    """The error for a database that cannot be reached, naming it and not the password."""
    reason = " ".join(str(error).split()).rstrip(".?") or type(error).__name__
    if f'role "{WORKER_ROLE}" does not exist' in reason:
        return PipelineError(
            ErrorCode.MIGRATIONS_PENDING,
            f"{describe_url(url)}: that role does not exist, so the schema has not been made. "
            "Run `upload-pipeline migrate`.",
        )
    if isinstance(error, TimeoutError):
        reason = "no answer in time"
    elif isinstance(error, ValueError):
        reason = "its URL has a part that cannot be read"
    return PipelineError(
        ErrorCode.DATABASE_UNAVAILABLE,
        f"Cannot connect to {describe_url(url)}: {reason}. "
        "Check that it runs and that UPLOAD_PIPELINE_DATABASE_URL is right.",
    )


def _parts(url: str) -> dict[str, str]:
    """The URL's words as libpq reads them, where it is sure that none of them is a piece of the password."""
    try:
        parts = {word: str(value) for word, value in conninfo_to_dict(url).items() if value is not None}
    except psycopg.ProgrammingError:
        # libpq's own words quote the URL, password and all.
        parts = {}
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    whole = scheme in ("postgresql", "postgres") and rest.count("@") == authority.count("@") <= 1
    if not parts or not whole or not re.fullmatch(r"[0-9,]*", parts.get("port", "")):
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            "The database's URL is not one of Postgres. It looks like postgresql://user:password@host:5432/database, "
            "with special characters in the password percent-encoded, as `@` in %40.",
        )
    return parts
