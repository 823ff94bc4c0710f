"""Postgres servers for tests: quick to start, gone at the end of the run, of several versions."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from upload_pipeline.database.embedded import EmbeddedDatabase, EmbeddedOptions, ensure_embedded, stop_embedded

FAST = EmbeddedOptions(durable=False, shared_buffers="128MB")
"""Nothing is synced to disk, so that a database is copied in milliseconds."""

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")

_PREFIX = "upload-pipeline-test-"


@dataclass(frozen=True, slots=True)
class Database:
    """A database of a test's own: `admin_url` owns its schema, `worker_url` is role `upload_worker`."""

    name: str
    admin_url: str
    worker_url: str


@contextmanager
def temporary_home() -> Iterator[Path]:
    """An empty home; the server that a test starts there is stopped at the end.

    It is not below pytest's own folder, which is closed to the user that the server runs as under root.
    """
    home = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        yield home
    finally:
        stop_embedded(home)
        shutil.rmtree(home)


@contextmanager
def server_of_version(version: int) -> Iterator[EmbeddedDatabase]:
    """A server of a major version; without one with pgvector here, the test is left out, saying why."""
    options = replace(FAST, version=version)
    if version == 15:
        _require_debian_15()
        options = replace(options, programs=DEBIAN_15)
    with temporary_home() as home:
        yield ensure_embedded(home, options)


def remove_servers_of_dead_runs() -> None:
    """Ends the servers that killed runs left, and removes their folders."""
    for home in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = home.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            stop_embedded(home)
            shutil.rmtree(home, ignore_errors=True)


def _require_debian_15() -> None:
    if not (DEBIAN_15 / "postgres").is_file():
        pytest.skip(f"there is no Postgres 15 here: no {DEBIAN_15}/postgres")
    asked = subprocess.run([str(DEBIAN_15 / "pg_config"), "--sharedir"], capture_output=True, text=True, check=False)
    if not (Path(asked.stdout.strip()) / "extension" / "vector.control").is_file():
        pytest.skip("the Postgres 15 here has no pgvector")
