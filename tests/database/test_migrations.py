from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from postgres_servers import Database

from upload_pipeline.database.migration_files import MigrationFile
from upload_pipeline.database.migrations import apply_migrations, pending_migrations
from upload_pipeline.errors import ErrorCode, PipelineError

FIRST = MigrationFile(
    "1", "first", "create table a (i int);\n-- a remark; with a semicolon\ninsert into a values (1);\n"
)
SECOND = MigrationFile("2", "second", "insert into a values (2); select pg_sleep(0.05);")
BROKEN = MigrationFile(
    "2", "broken", "create table b (i int);\n\ninsert into a\n  values ('x');\ncreate table c (i int);"
)

APPLY_IN_A_PROCESS = """
import sys
from upload_pipeline.database.migration_files import MigrationFile
from upload_pipeline.database.migrations import apply_migrations
files = [MigrationFile(str(n), "many", f"create table t{n} (i int); select pg_sleep(0.02)") for n in range(1, 6)]
print(*[applied.version for applied in apply_migrations(sys.argv[1], migrations=files)])
"""


def ask(database: Database, query: str) -> list[Any]:
    with psycopg.connect(database.admin_url, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


def ledger(database: Database) -> list[Any]:
    return ask(database, "select version, name, statements from supabase_migrations.schema_migrations order by version")


def versions(applied: list[Any]) -> list[str]:
    return [migration.version for migration in applied]


def test_applies_in_order_and_keeps_the_supabase_ledger(empty_database: Database) -> None:
    applied = apply_migrations(empty_database.admin_url, migrations=[FIRST, SECOND])

    assert [(done.version, done.name) for done in applied] == [("1", "first"), ("2", "second")]
    assert ask(empty_database, "select i from a order by i") == [(1,), (2,)]
    assert ledger(empty_database) == [
        ("1", "first", ["create table a (i int)", "insert into a values (1)"]),
        ("2", "second", ["insert into a values (2)", "select pg_sleep(0.05)"]),
    ]
    columns = ask(
        empty_database,
        "select column_name::text, udt_name::text from information_schema.columns "
        "where table_schema = 'supabase_migrations' order by ordinal_position",
    )
    assert columns == [("version", "text"), ("statements", "_text"), ("name", "text")]


def test_second_call_applies_nothing(empty_database: Database) -> None:
    apply_migrations(empty_database.admin_url, migrations=[FIRST])

    assert apply_migrations(empty_database.admin_url, migrations=[FIRST]) == []
    assert versions(apply_migrations(empty_database.admin_url, migrations=[FIRST, SECOND])) == ["2"]


def test_pending_names_what_is_missing_and_changes_nothing(empty_database: Database) -> None:
    assert pending_migrations(empty_database.admin_url, migrations=[FIRST, SECOND]) == [FIRST, SECOND]
    assert ask(empty_database, "select count(*) from pg_namespace where nspname = 'supabase_migrations'") == [(0,)]

    apply_migrations(empty_database.admin_url, migrations=[FIRST])
    assert pending_migrations(empty_database.admin_url, migrations=[FIRST, SECOND]) == [SECOND]


def test_failing_statement_leaves_nothing_of_its_file_and_is_named(empty_database: Database) -> None:
    with pytest.raises(PipelineError) as caught:
        apply_migrations(empty_database.admin_url, migrations=[FIRST, BROKEN])

    error = caught.value
    assert error.code is ErrorCode.MIGRATION_FAILED
    assert "2_broken.sql, statement 2 of 3 (line 3)" in error.message
    assert "insert into a\n  values ('x')" in error.message
    assert error.details == {"file": "2_broken.sql", "statement": 2, "line": 3, "sqlstate": "22P02"}
    assert ask(empty_database, "select to_regclass('b'), (select count(*) from a)") == [(None, 1)]
    assert [row[0] for row in ledger(empty_database)] == ["1"]

    mended = MigrationFile("2", "broken", BROKEN.sql.replace("'x'", "3"))
    assert versions(apply_migrations(empty_database.admin_url, migrations=[FIRST, mended])) == ["2"]


def test_first_failing_file_leaves_a_database_as_it_was(empty_database: Database) -> None:
    with pytest.raises(PipelineError, match=r"1_bad\.sql, statement 1"):
        apply_migrations(empty_database.admin_url, migrations=[MigrationFile("1", "bad", "select 1/0")])

    assert ask(
        empty_database,
        "select count(*) from pg_namespace where nspname in ('auth', 'extensions', 'supabase_migrations')",
    ) == [(0,)]


def test_processes_at_once_both_succeed_and_apply_once(empty_database: Database) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", APPLY_IN_A_PROCESS, empty_database.admin_url],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        for _ in range(3)
    ]
    applied = [process.communicate(timeout=60)[0].split() for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(version for part in applied for version in part) == ["1", "2", "3", "4", "5"]


def test_process_killed_in_the_middle_leaves_whole_migrations(empty_database: Database) -> None:
    slow = [FIRST, MigrationFile("2", "slow", "create table half (i int); select pg_sleep(30)")]
    script = (
        "import sys\n"
        "from upload_pipeline.database.migration_files import MigrationFile\n"
        "from upload_pipeline.database.migrations import apply_migrations\n"
        f"files = [MigrationFile(*part) for part in {[(m.version, m.name, m.sql) for m in slow]!r}]\n"
        "apply_migrations(sys.argv[1], migrations=files)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, empty_database.admin_url], cwd=Path(__file__).parent)
    sleeping = "select count(*) from pg_stat_activity where query = 'select pg_sleep(30)' and state = 'active'"
    while ask(empty_database, sleeping) == [(0,)]:
        assert process.poll() is None
    process.kill()
    process.wait()
    ask(
        empty_database,
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
        "where application_name = 'upload-pipeline migrate' and datname = current_database()",
    )

    quick = [FIRST, MigrationFile("2", "slow", "create table half (i int)")]
    assert versions(apply_migrations(empty_database.admin_url, migrations=quick)) == ["2"]


def test_version_that_only_the_database_has_is_named(empty_database: Database) -> None:
    apply_migrations(empty_database.admin_url, migrations=[FIRST, SECOND])

    for call in (apply_migrations, pending_migrations):
        with pytest.raises(PipelineError, match="has the migration 2, which this version of the program does not have"):
            call(empty_database.admin_url, migrations=[FIRST])


def test_file_changed_after_it_was_applied_is_named(empty_database: Database) -> None:
    apply_migrations(empty_database.admin_url, migrations=[FIRST])
    changed = MigrationFile("1", "first", FIRST.sql.replace("values (1)", "values (9)"))

    with pytest.raises(PipelineError, match=r"1_first.sql is not the one that was applied"):
        apply_migrations(empty_database.admin_url, migrations=[changed])


def test_ledger_of_another_tool_counts(empty_database: Database) -> None:
    apply_migrations(empty_database.admin_url, migrations=[FIRST])
    # Cut, spaced and commented otherwise; and without statements, as `migration repair` writes.
    ask(
        empty_database,
        "update supabase_migrations.schema_migrations set statements = "
        "array[E'create table a\\n(i int);', '-- b\ninsert into a values (1);'] returning 1",
    )
    ask(empty_database, "insert into supabase_migrations.schema_migrations (version) values ('2') returning 1")

    assert apply_migrations(empty_database.admin_url, migrations=[FIRST, SECOND]) == []


def test_oldest_ledger_without_names_is_completed(empty_database: Database) -> None:
    with psycopg.connect(empty_database.admin_url, autocommit=True) as connection:
        connection.execute("create schema supabase_migrations")
        connection.execute("create table supabase_migrations.schema_migrations (version text primary key)")

    apply_migrations(empty_database.admin_url, migrations=[FIRST])

    assert ledger(empty_database)[0][:2] == ("1", "first")


@pytest.mark.parametrize("word", ["begin", "COMMIT", "rollback", "start transaction"])
def test_transaction_of_its_own_is_refused_before_anything_runs(empty_database: Database, word: str) -> None:
    own = MigrationFile("2", "own", f"select 1;\n{word};")

    with pytest.raises(PipelineError, match=r"2_own.sql, line 2: each migration is one transaction already"):
        apply_migrations(empty_database.admin_url, migrations=[FIRST, own])
    assert pending_migrations(empty_database.admin_url, migrations=[FIRST]) == [FIRST]


def test_role_without_rights_is_told_what_to_do(empty_database: Database, template_database: str) -> None:
    assert template_database, "whose migrations make the server's role upload_worker"
    with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_MIGRATION_DATABASE_URL") as caught:
        apply_migrations(empty_database.worker_url)

    assert caught.value.details["sqlstate"] == "42501"


def test_projects_own_migrations_are_all_applied(database: Database) -> None:
    assert pending_migrations(database.admin_url) == []
    assert apply_migrations(database.admin_url) == []
