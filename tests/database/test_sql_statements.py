from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from postgres_servers import Database
from psycopg import pq

from upload_pipeline.database.migration_files import load_compat
from upload_pipeline.database.sql_statements import split_statements

ROOT = Path(__file__).parents[2]

WHOLE = [
    "select ';'",
    "select 'it''s; fine'",
    r"select E'a\'; b', e'\\'",
    "select E'a'\n  'b\\'; c'",
    'select 1 as "a;""b"',
    "select $$ a; b $$, $x$ $$; $x$",
    "select a$b$c from t",
    "select 1 /* a; /* nested; */ b; */ + 2",
    "select 1 -- a; b\n + 2",
    "create rule r as on insert to t do also (select 1; select 2)",
    "create function f() returns int begin atomic select case when true then 1 end; select 2; end",
    "do $body$ begin raise notice ';'; end $body$",
    "select U&'d\\0061t;a', B'1', x'1F', 1.5e3, :'v'",
]


@pytest.mark.parametrize("statement", WHOLE)
def test_keeps_a_statement_whole(statement: str) -> None:
    assert [found.text for found in split_statements(f"{statement};\n{statement} ;")] == [statement, statement]


@given(st.lists(st.sampled_from(WHOLE), max_size=6), st.sampled_from([";", " ;\n", ";-- x; y\n", "; /* ; */", ";;\n;"]))
def test_cuts_between_statements_whatever_stands_between(statements: list[str], between: str) -> None:
    assert [found.text for found in split_statements(between.join(statements))] == statements


@given(st.text(alphabet="a1_ '\"$;-/*\\\n(),Eeé", max_size=60))
def test_any_text_is_cut_without_loss(text: str) -> None:
    found = split_statements(text)

    position = 0
    for statement in found:
        position = text.index(statement.text, position) + len(statement.text)
        assert statement.words
    assert split_statements(text[position:]) == () or not found


def test_tells_the_line_and_drops_comments_around() -> None:
    (first, second) = split_statements("-- head\n\nselect 1; -- tail\n/* before */ select\n 2 -- end")

    assert (first.text, first.line) == ("select 1", 3)
    assert (second.text, second.line) == ("select\n 2", 4)


def test_spelling_does_not_change_the_words() -> None:
    (a,) = split_statements("select  1 /* x */ + 2")
    (b,) = split_statements("select 1\n+ 2;")

    assert a.words == b.words


def test_open_quote_runs_to_the_end() -> None:
    assert [found.text for found in split_statements("select $$ a; b")] == ["select $$ a; b"]


def test_cuts_the_schema_as_the_server_does(empty_database: Database) -> None:
    sql = "\n".join([load_compat(), *(path.read_text() for path in sorted((ROOT / "sql" / "schema").glob("*.sql")))])
    with psycopg.connect(empty_database.admin_url, autocommit=True) as connection:
        connection.pgconn.send_query(sql.encode())
        results = []
        while (result := connection.pgconn.get_result()) is not None:
            results.append(pq.ExecStatus(result.status))

    assert pq.ExecStatus.FATAL_ERROR not in results
    assert len(split_statements(sql)) == len(results)
