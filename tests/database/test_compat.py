"""What a plain Postgres is given in Supabase's place, and that the migrations need no more than Supabase gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from postgres_servers import Database, server_of_version

from upload_pipeline.database.embedded import EmbeddedDatabase
from upload_pipeline.database.migration_files import load_compat
from upload_pipeline.database.migrations import apply_migrations, pending_migrations
from upload_pipeline.errors import PipelineError

USER = UUID("11111111-2222-4333-8444-555555555555")

CALLER = "select auth.uid(), auth.role(), auth.email(), auth.jwt()"


@pytest.fixture
def plain(empty_database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A database with the compatibility file applied, and nothing else."""
    with psycopg.connect(empty_database.admin_url, autocommit=True) as connection:
        connection.execute(load_compat().encode())
        yield connection


@pytest.fixture(scope="module", params=[15, 16, 18])
def fresh_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedDatabase]:
    """A server on which nobody has made any role."""
    with server_of_version(request.param) as server:
        yield server


def test_running_it_again_changes_nothing(plain: psycopg.Connection[Any]) -> None:
    plain.execute("insert into auth.users (id) values (%s)", [USER])
    plain.execute(load_compat().encode())

    assert plain.execute("select id from auth.users").fetchall() == [(USER,)]


def test_roles_are_those_of_supabase(plain: psycopg.Connection[Any]) -> None:
    roles = plain.execute(
        """
        select rolname::text, rolcanlogin, rolinherit, rolbypassrls, rolsuper, rolcreaterole, rolconfig
          from pg_roles where rolname in ('anon', 'authenticated', 'service_role') order by 1
        """
    ).fetchall()

    assert roles == [
        ("anon", False, True, False, False, False, ["statement_timeout=3s"]),
        ("authenticated", False, True, False, False, False, ["statement_timeout=8s"]),
        ("service_role", False, True, True, False, False, None),
    ]


def test_caller_is_read_from_the_claims(plain: psycopg.Connection[Any]) -> None:
    claims = f'{{"sub": "{USER}", "role": "authenticated", "email": "a@b.c"}}'
    with plain.transaction():
        plain.execute("set local role authenticated")
        plain.execute("select set_config('request.jwt.claims', %s, true)", [claims])
        row = plain.execute(CALLER.encode()).fetchone()
    assert row == (USER, "authenticated", "a@b.c", {"sub": str(USER), "role": "authenticated", "email": "a@b.c"})

    # After that transaction the setting is '' and not unset.
    assert plain.execute(CALLER.encode()).fetchone() == (None, None, None, None)


def test_caller_is_nobody_without_claims(plain: psycopg.Connection[Any]) -> None:
    assert plain.execute(CALLER.encode()).fetchone() == (None, None, None, None)


def test_users_cannot_be_read_by_the_api_roles(plain: psycopg.Connection[Any]) -> None:
    for role in ("anon", "authenticated", "service_role"):
        plain.execute(f"set role {role}".encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            plain.execute("select * from auth.users")
        plain.execute("reset role")


def test_vector_is_in_schema_extensions(plain: psycopg.Connection[Any]) -> None:
    with plain.transaction():
        plain.execute("set local role anon")
        row = plain.execute("select '[1,2]'::extensions.vector operator(extensions.<=>) '[1,2]'").fetchone()

    assert row == (0.0,)


def test_vector_in_another_schema_is_named_with_the_remedy(empty_database: Database) -> None:
    with psycopg.connect(empty_database.admin_url, autocommit=True) as connection:
        connection.execute("create extension vector with schema public")

    with pytest.raises(PipelineError, match="alter extension vector set schema extensions"):
        apply_migrations(empty_database.admin_url)


def test_is_applied_only_where_there_is_no_schema_auth(empty_database: Database) -> None:
    with psycopg.connect(empty_database.admin_url, autocommit=True) as connection:
        connection.execute("create schema auth")
        with pytest.raises(PipelineError):
            apply_migrations(empty_database.admin_url)

        assert connection.execute("select to_regclass('auth.users')").fetchone() == (None,)


def test_migrations_apply_to_a_plain_server_of_each_version(fresh_server: EmbeddedDatabase) -> None:
    assert apply_migrations(fresh_server.admin_url)
    assert pending_migrations(fresh_server.admin_url) == []
    with psycopg.connect(fresh_server.worker_url, autocommit=True) as worker:
        assert worker.execute("select count(*) > 0 from upload_pipeline.stages").fetchone() == (True,)


@pytest.fixture(scope="module", params=[15, 16, 18])
def hosted_like(request: pytest.FixtureRequest) -> Iterator[EmbeddedDatabase]:
    """A server as Supabase hosts it: `mig` is what `postgres` is there, no superuser; its database is `hosted`."""
    with server_of_version(request.param) as server:
        with psycopg.connect(server.url("postgres", "postgres"), autocommit=True) as superuser:
            superuser.execute("create role mig login nosuperuser createdb createrole replication bypassrls")
            superuser.execute("create database hosted owner mig")
        with psycopg.connect(server.url("postgres", "hosted"), autocommit=True) as superuser:
            superuser.execute(load_compat().encode())
            superuser.execute("grant anon, authenticated, service_role to mig with admin option")
            superuser.execute("grant usage on schema auth to mig")
            superuser.execute("grant select, references on auth.users to mig")
            superuser.execute("alter schema extensions owner to mig")
        yield server


def test_migrations_need_no_superuser(hosted_like: EmbeddedDatabase) -> None:
    url = hosted_like.url("mig", "hosted")

    assert apply_migrations(url)
    assert apply_migrations(url) == []
    with psycopg.connect(hosted_like.url("upload_worker", "hosted"), autocommit=True) as worker:
        assert worker.execute("select count(*) > 0 from upload_pipeline.stages").fetchone() == (True,)
        attributes = worker.execute(
            "select rolsuper, rolbypassrls, rolcreaterole from pg_roles where rolname = current_user"
        ).fetchone()
        assert attributes == (False, False, False)
        assert pending_migrations(hosted_like.url("upload_worker", "hosted")) == [], "the worker may look"
