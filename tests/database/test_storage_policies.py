"""The policies on Supabase's `storage.objects`, on a table of that shape: a user adds and reads the own files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from postgres_servers import Database

from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.photo_keys import photo_key, shared_key, thumbnail_key

POLICIES = (Path(__file__).parents[2] / "sql" / "supabase" / "storage_policies.sql").read_text()
BUCKET = "upload-pipeline"
USER = UUID("11111111-2222-4333-8444-555555555555")
OTHER = UUID("99999999-2222-4333-8444-555555555555")
FILE = UUID("aaaaaaaa-2222-4333-8444-555555555555")

# As supabase/storage makes them, as far as policies go.
STORAGE = """
create schema storage;
grant usage on schema storage to authenticated, anon;
create table storage.objects (
  id uuid primary key default gen_random_uuid(), bucket_id text, name text, owner_id text,
  unique (bucket_id, name));
alter table storage.objects enable row level security;
grant all on storage.objects to authenticated, anon;
create function storage.foldername(name text) returns text[] language plpgsql immutable as $$
declare _parts text[] := string_to_array(name, '/');
begin return _parts[1 : array_length(_parts, 1) - 1]; end $$;
create function storage.filename(name text) returns text language plpgsql immutable as $$
declare _parts text[] := string_to_array(name, '/');
begin return _parts[array_length(_parts, 1)]; end $$;
"""


@pytest.fixture
def storage(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_url, autocommit=True) as connection:
        connection.execute(STORAGE)
        connection.execute(POLICIES.encode())
        yield connection


def as_caller(connection: psycopg.Connection[Any], user: UUID | None, statement: str, *values: object) -> list[Any]:
    role = "authenticated" if user else "anon"
    claims = {"sub": str(user), "role": role} if user else {"role": role}
    with connection.transaction():
        connection.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps(claims)])
        connection.execute(f"set local role {role}")
        found = connection.execute(statement.encode(), values)
        return found.fetchall() if found.description else [found.rowcount]


def add(connection: psycopg.Connection[Any], user: UUID | None, name: str, bucket: str = BUCKET) -> None:
    as_caller(connection, user, "insert into storage.objects (bucket_id, name) values (%s, %s)", bucket, name)


def test_a_user_adds_and_reads_the_own_files_alone(storage: psycopg.Connection[Any]) -> None:
    mine, theirs = raw_key(USER, uuid4()), raw_key(OTHER, uuid4())
    add(storage, USER, mine)
    add(storage, OTHER, theirs)
    assert as_caller(storage, USER, "select name from storage.objects") == [(mine,)]
    assert as_caller(storage, OTHER, "select name from storage.objects") == [(theirs,)]
    assert as_caller(storage, None, "select name from storage.objects") == []


def test_nobody_changes_or_removes_anything(storage: psycopg.Connection[Any]) -> None:
    mine = raw_key(USER, uuid4())
    add(storage, USER, mine)
    assert as_caller(storage, USER, "update storage.objects set name = %s", raw_key(USER, uuid4())) == [0]
    assert as_caller(storage, USER, "delete from storage.objects") == [0]
    with pytest.raises(psycopg.errors.UniqueViolation):
        add(storage, USER, mine)


@pytest.mark.parametrize(
    "name",
    [
        raw_key(OTHER, FILE),
        f"parsed/{USER}/{FILE}",
        f"{USER}/{FILE}",
        f"raw/{USER}",
        f"raw/{USER}/backup.zip",
        f"raw/{USER}/{FILE}/{FILE}",
        f"raw/{USER}/{FILE}\n",
        f"other/raw/{USER}/{FILE}",
        f"incoming/{FILE}",
    ],
)
def test_other_names_are_refused(storage: psycopg.Connection[Any], name: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        add(storage, USER, name)


def test_a_member_adds_photos_to_the_organisations_projects_and_reads_none(storage: psycopg.Connection[Any]) -> None:
    viewer = uuid4()
    (organization,) = storage.execute("select upload_pipeline.add_organization('roofs')").fetchone() or ()
    for user, role in ((USER, "owner"), (viewer, "viewer")):
        storage.execute("select upload_pipeline.set_member(%s, %s, %s)", [organization, user, role])
    (project,) = storage.execute("select upload_pipeline.add_project(%s, 'elm')", [organization]).fetchone() or ()
    photo = photo_key(project, date(2026, 11, 21), FILE, "image/png")
    for user, name in (
        (OTHER, photo),
        (viewer, photo),
        (USER, photo_key(uuid4(), date(2026, 11, 21), FILE, "image/png")),
        (USER, thumbnail_key(photo)),
        (USER, shared_key(photo)),
        (USER, f"{project}/{FILE}.png"),
        (USER, f"other/{photo}"),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            add(storage, user, name)
    add(storage, USER, photo)
    assert as_caller(storage, USER, "select name from storage.objects") == []
    storage.execute(POLICIES.replace("text := '';  ", "text := 'claims/2026';  ").encode())
    add(storage, USER, f"claims/2026/{photo}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        add(storage, USER, photo_key(project, date(2026, 11, 22), FILE, "image/png"))


def test_other_buckets_and_nobody_are_refused(storage: psycopg.Connection[Any]) -> None:
    for user, name, bucket in (
        (USER, raw_key(USER, uuid4()), "other"),
        (None, raw_key(USER, uuid4()), BUCKET),
        (None, f"raw//{uuid4()}", BUCKET),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            add(storage, user, name, bucket)


def test_running_it_again_puts_another_prefix_in_the_place_of_the_first(storage: psycopg.Connection[Any]) -> None:
    key = raw_key(USER, uuid4())
    storage.execute(POLICIES.encode())
    add(storage, USER, key)
    storage.execute(POLICIES.replace("text := '';  ", "text := 'claims/2026';  ").encode())
    add(storage, USER, f"claims/2026/{key}")
    assert as_caller(storage, USER, "select name from storage.objects") == [(f"claims/2026/{key}",)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        add(storage, USER, raw_key(USER, uuid4()))


def test_without_storage_it_does_nothing_and_says_so(database: Database) -> None:
    with psycopg.connect(database.admin_url, autocommit=True) as connection:
        said: list[str] = []
        connection.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
        connection.execute(POLICIES.encode())
    assert len(said) == 1
    assert "no storage.objects" in said[0]
