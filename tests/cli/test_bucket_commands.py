"""The commands with their objects in a bucket, on a server that speaks S3."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from command_runs import Terminal
from postgres_servers import Database
from s3_servers import S3Server

from upload_pipeline.storage.keys import incoming_key, raw_key
from upload_pipeline.storage.store import open_store
from upload_pipeline.storage.store_mark import MARK_KEY, write_mark


@pytest.fixture
def settings(s3_server: S3Server, s3_bucket: str, database: Database, terminal: Terminal) -> dict[str, str]:
    """Of commands that keep their objects below a prefix of the test's bucket."""
    terminal.environment.update(s3_server.environment())
    return {"storage_url": f"s3://{s3_bucket}/claims/2026", "database_url": database.worker_url}


def keys(server: S3Server, bucket: str) -> list[str]:
    return re.findall(r"<Key>([^<]+)</Key>", server.listing(bucket))


def wait_for_worker(database: Database) -> None:
    with psycopg.connect(database.admin_url, autocommit=True) as connection:
        deadline = time.monotonic() + 30
        while connection.execute("select count(*) from upload_pipeline.workers").fetchone() == (0,):
            assert time.monotonic() < deadline, "no worker signed on"
            time.sleep(0.05)


def test_files_go_through_a_bucket_and_leave_nothing_in_it(
    terminal: Terminal,
    files: Path,
    user: str,
    settings: dict[str, str],
    database: Database,
    s3_server: S3Server,
    s3_bucket: str,
) -> None:
    with terminal.running("worker", **settings):
        wait_for_worker(database)
        ended = terminal("ingest", files / "roof.md", files / "note.txt", "--user", user, "--json", **settings)
    assert ended.status == 0, ended.err
    documents = {line["document_id"] for line in ended.lines()}
    assert {line["state"] for line in ended.lines()} == {"done"}
    kept = keys(s3_server, s3_bucket)
    assert len(kept) == 6
    assert all(key.startswith(("claims/2026/raw/", "claims/2026/parsed/")) for key in kept)

    hits = terminal("search", "cracked shingles", "--user", user, "--limit", "1", "--json", **settings).object()["hits"]
    assert hits[0]["filename"] == "roof.md"

    for document in documents:
        assert terminal("delete", document, **settings).status == 0
    assert keys(s3_server, s3_bucket) == []


def test_maintenance_removes_orphans_of_a_bucket_and_nothing_that_is_not_ours(
    terminal: Terminal, settings: dict[str, str], s3_server: S3Server, s3_bucket: str
) -> None:
    async def leave_things() -> None:
        store, whole = open_store(settings["storage_url"]), open_store(f"s3://{s3_bucket}")
        await store.put_bytes(raw_key(uuid4(), uuid4()), b"no row names it")
        await store.put_bytes(incoming_key(uuid4()), b"an upload that never ended")
        await store.put_bytes("somebody/elses", b"not ours")
        await whole.put_bytes(raw_key(uuid4(), uuid4()), b"outside the prefix")

    assert terminal("maintenance", **settings).status == 0
    assert keys(s3_server, s3_bucket) == [f"claims/2026/{MARK_KEY}"]
    asyncio.run(leave_things())
    assert terminal("maintenance", **settings).status == 0
    assert len(keys(s3_server, s3_bucket)) == 5
    time.sleep(2)  # S3's times are whole seconds
    ended = terminal("maintenance", orphan_grace="1", **settings)
    assert ended.status == 0
    left = keys(s3_server, s3_bucket)
    assert len(left) == 3
    assert {"claims/2026/somebody/elses", f"claims/2026/{MARK_KEY}"} < set(left)


def test_maintenance_does_not_touch_the_files_of_another_database_until_it_is_told_to(
    terminal: Terminal, settings: dict[str, str], s3_server: S3Server, s3_bucket: str
) -> None:
    async def leave_things() -> None:
        store = open_store(settings["storage_url"])
        await store.put_bytes(raw_key(uuid4(), uuid4()), b"of another database")
        await write_mark(store, uuid4())

    asyncio.run(leave_things())
    time.sleep(2)  # S3's times are whole seconds
    refused = terminal("maintenance", orphan_grace="1", **settings)
    assert refused.status == 1
    assert "The store was not swept: the store bears the mark of another database" in refused.out
    assert len(keys(s3_server, s3_bucket)) == 2
    assert terminal("maintenance", "--adopt-store", "--json", orphan_grace="1", **settings).status == 0
    assert keys(s3_server, s3_bucket) == [f"claims/2026/{MARK_KEY}"]
    assert terminal("maintenance", **settings).status == 0


def test_a_store_that_is_none_stops_the_command_before_anything_else(bare_terminal: Terminal) -> None:
    ended = bare_terminal("worker", storage_url="ftp://bucket")
    assert ended.status != 0
    assert "UPLOAD_PIPELINE_STORAGE_URL='ftp://bucket' is not allowed" in ended.err
    assert "s3://<bucket>[/<prefix>]" in ended.err
