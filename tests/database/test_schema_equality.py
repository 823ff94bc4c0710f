"""The migrations and `sql/schema` build the same database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from catalog import catalog
from postgres_servers import Database

from upload_pipeline.database.migration_files import load_compat

SCHEMA = Path(__file__).parents[2] / "sql" / "schema"

CHANGES = [
    ("columns", "alter table upload_pipeline.documents alter column filename drop not null"),
    ("columns", "alter table upload_pipeline.documents add column extra text"),
    ("columns", "alter table upload_pipeline.upload_jobs alter column priority set default 9"),
    ("indexes", "create index extra on upload_pipeline.documents (filename)"),
    ("constraints", "alter table upload_pipeline.documents add constraint extra check (filename <> 'x')"),
    ("relations", "alter table upload_pipeline.upload_jobs set (fillfactor = 33)"),
    ("relations", "grant select on upload_pipeline.lanes to anon"),
    ("relations", "alter table upload_pipeline.documents disable row level security"),
    ("columns", "grant select (filename) on upload_pipeline.documents to anon"),
    ("policies", "create policy extra on upload_pipeline.documents for select to anon using (true)"),
    ("functions", "grant execute on function upload_pipeline.now() to anon"),
    ("functions", "alter function upload_pipeline.now() volatile"),
    ("types", "alter type upload_pipeline.job_state add value 'lost'"),
    ("rows", "update upload_pipeline.stages set progress = progress + 1 where stage = 'parsed'"),
    ("schemas", "grant usage on schema upload_pipeline to anon"),
    ("comments", "comment on table upload_pipeline.documents is 'papers'"),
]


@pytest.fixture
def migrated(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_url, autocommit=True) as connection:
        yield connection


def test_migrations_and_schema_files_build_the_same_catalog(
    migrated: psycopg.Connection[Any], empty_database: Database
) -> None:
    with psycopg.connect(empty_database.admin_url, autocommit=True) as built:
        built.execute(load_compat().encode())
        for path in sorted(SCHEMA.glob("*.sql")):
            built.execute(path.read_bytes())
        expected = catalog(built)
    found = catalog(migrated)

    for kind, lines in expected.items():
        assert found[kind] == lines, f"{kind} differ"
    assert all(expected[kind] for kind in ("relations", "columns", "functions", "policies", "indexes", "rows"))


@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=[change[:60] for _, change in CHANGES])
def test_a_change_of_the_schema_shows_in_the_catalog(migrated: psycopg.Connection[Any], kind: str, change: str) -> None:
    before = catalog(migrated)
    migrated.execute(change.encode())
    after = catalog(migrated)

    assert kind in {name for name in after if after[name] != before[name]}
