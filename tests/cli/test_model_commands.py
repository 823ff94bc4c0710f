"""Changing the embedding model from the terminal: what docs/models.md says to type, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from command_runs import Ended, Terminal, clean_environment

from tests.simulators.openai_embeddings import KEY
from tests.simulators.simulator_process import running_simulator

GUIDE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
OLD, NEW = "wordllama-256", "wordllama-256@128"


def commands(number: int) -> list[list[str]]:
    """The commands of one block of the guide, without the program's name."""
    block = re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)[number]
    return [words[1:] for line in block.splitlines() if (words := shlex.split(line))[0] == "upload-pipeline"]


@pytest.fixture
def terminal(database: Any, tmp_path: Path) -> Terminal:
    """Commands on a database of the test's own."""
    environment = {**clean_environment(tmp_path / "home"), "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url}
    return Terminal(environment, tmp_path)


@pytest.fixture
def admin(database: Any) -> Any:
    """A database with the local model and one document of three chunks."""
    with psycopg.connect(database.admin_url, autocommit=True) as connection:
        document, user = uuid4(), uuid4()
        connection.execute("select upload_pipeline.register_model(%s, 'local', 256)", [OLD])
        connection.execute(
            """
            insert into upload_pipeline.documents
              (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, chunk_count, embed_model,
               searchable_at)
            values (%s, %s, 'a.md', 'text/markdown', 1, repeat('a', 64), 'raw/a', 3, %s, now())
            """,
            [document, user, OLD],
        )
        connection.execute(
            """
            insert into upload_pipeline.document_chunks
              (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
               heading_path, section_ids, embed_model, embedding, live)
            select gen_random_uuid(), %s, %s, i, 'word', repeat('a', 64), 'c', 0, 4, '{}', '{}', %s,
                   array_fill(0.0625::real, array[256])::extensions.vector, true
              from generate_series(1, 3) i
            """,
            [document, user, OLD],
        )
        yield connection


def fill(admin: Any, model: str = NEW, most: int = 3) -> None:
    """What the workers would have done."""
    admin.execute(
        """
        insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding)
        select c.chunk_id, m.model, c.document_id, array_fill(0.1::real, array[m.dimensions])::extensions.vector
          from upload_pipeline.document_chunks c join upload_pipeline.embedding_models m on m.model = %s limit %s
        """,
        [model, most],
    )


def table(ended: Ended) -> dict[str, str]:
    return {line.split()[0]: " ".join(line.split()[1:]) for line in ended.out.splitlines()[1:] if line}


def test_the_guide_leads_from_one_model_to_the_other(terminal: Terminal, admin: Any) -> None:
    status, add, again, activate, last = commands(0)
    assert table(terminal(*status)) == {OLD: "active local 256 3 of 3"}
    assert terminal(*add).out == f"{NEW} is being filled.\n"
    fill(admin, most=2)
    assert table(terminal(*again))[NEW].startswith("building local 128 2 of 3 66 %")
    refused = terminal(*activate)
    assert refused.status == 1
    assert f'1 chunks of 1 documents have no vector of "{NEW}" yet' in refused.err
    pause, resume, jobs = commands(1)
    assert terminal(*pause).out == f"The filling of {NEW} is paused.\n"
    assert table(terminal(*again))[NEW].startswith("paused")
    assert terminal(*resume).out == f"The filling of {NEW} goes on.\n"
    assert terminal(*jobs).status == 0
    admin.execute("delete from upload_pipeline.chunk_vectors")
    fill(admin)
    assert "filled: it can be activated" in table(terminal(*again))[NEW]
    assert terminal(*activate).out == f"{NEW} is the active model. The vectors of {OLD} are kept for 7 d.\n"
    assert terminal(*activate).out == f"{NEW} is the active model already.\n"
    shown = table(terminal(*last))
    assert shown[NEW] == "active local 128 3 of 3"
    assert "kept until" in shown[OLD]
    (retire,) = commands(2)
    early = terminal(*retire[:-1])
    assert early.status == 1
    assert "can be activated again until" in early.err
    assert terminal(*retire).out == f"{OLD} is retired; workers remove its vectors.\n"
    assert "3 vectors to be removed" in table(terminal(*last))[OLD]
    assert f"models add {OLD}" in terminal("models", "activate", OLD).err


def test_the_status_is_one_object_a_line(terminal: Terminal, admin: Any) -> None:
    added = terminal("models", "add", NEW, "--paused", "--json").object()
    assert added == {"model": NEW, "status": "building", "dimensions": 128, "paused": True}
    active, building = terminal("models", "status", "--json").lines()
    assert (active["model"], active["status"], active["lacking_chunks"]) == (OLD, "active", 0)
    assert (building["model"], building["paused"], building["lacking_chunks"]) == (NEW, True, 3)
    assert building["time_left"] is None
    gone = terminal("models", "retire", NEW, "--json").object()
    assert gone == {"model": NEW, "jobs_cancelled": 0}
    fill(admin)
    back = terminal("models", "activate", OLD, "--json").object()
    assert (back["before"], back["grace_seconds"]) == (OLD, 604_800)


REFUSED = [
    (["add", OLD], "is the active one"),
    (["add", "wordllama-256@100"], "may have 64, 128, 256 dimensions, not 100"),
    (["add", "wordllama-256@128", "--dimensions", "64"], "--dimensions says 64"),
    (["add", "unheard-of"], "name its --provider"),
    (["add", "unheard-of", "--provider", "local"], "no local embedding model 'unheard-of'"),
    (["add", "unheard-of", "--provider", "nobody"], "no provider 'nobody'"),
    (["add", "bge-m3", "--provider", "openai"], "say so by --dimensions"),
    (["add", "text-embedding-3-small"], "OPENAI_API_KEY"),
    (["activate", NEW], "there is no embedding model"),
    (["pause", OLD], "is not being filled"),
    (["retire", OLD], "is the active one"),
]


def test_what_cannot_be_done_is_refused_by_name(terminal: Terminal, admin: Any) -> None:
    for words, said in REFUSED:
        ended = terminal("models", *words)
        assert ended.status != 0, words
        assert said.lower() in ended.err.lower(), words
    assert admin.execute("select count(*) from upload_pipeline.embedding_models").fetchone() == (1,)


@pytest.mark.parametrize(
    ("words", "gives"),
    [
        (["text-embedding-3-large", "--dimensions", "9999"], "gives vectors of 3072 dimensions, not 9999"),
        (["text-embedding-3-small@2000"], "gives vectors of 1536 dimensions, not 2000"),
        (["text-embedding-ada-002", "--dimensions", "512"], "gives vectors of 1536 dimensions, not 512"),
    ],
)
def test_dimensions_that_a_model_has_not_are_told_as_they_were_given(
    terminal: Terminal, words: list[str], gives: str
) -> None:
    terminal.environment["UPLOAD_PIPELINE_OPENAI_API_KEY"] = KEY
    refused = terminal("models", "add", *words)
    assert refused.status != 0
    assert gives in refused.err
    # nobody has set it
    assert "OPENAI_DIMENSIONS" not in refused.err


def test_a_database_without_documents_takes_any_model_at_once(terminal: Terminal) -> None:
    assert "No models" in terminal("models", "status").err
    assert terminal("models", "add", NEW).out == f"{NEW} is the active model, the first of this database.\n"


def test_the_text_that_a_model_is_tried_with_is_in_the_usage(terminal: Terminal, database: Any) -> None:
    with running_simulator("tests.simulators.openai_embeddings") as url:
        terminal.environment.update(
            {
                "UPLOAD_PIPELINE_OPENAI_API_KEY": KEY,
                "UPLOAD_PIPELINE_OPENAI_BASE_URL": url,
                "UPLOAD_PIPELINE_PRICES": json.dumps({"openai/text-embedding-3-small": {"tokens": 0.02}}),
            }
        )
        books = url.removesuffix("/v1")
        add = ("models", "add", "text-embedding-3-small", "--dimensions", "16")
        misbehave(books, "truncated")
        assert terminal(*add).status == 0
        misbehave(books, "wrong_dimensions", times=3)
        assert "is no list of 1 vectors" in terminal(*add).err
        tokens = httpx.get(f"{books}/books").json()["tokens"] // 5
    with psycopg.connect(database.admin_url) as connection:
        rows = connection.execute(
            """
            select provider, model, operation, requests, tokens, job_id, document_id, user_id, cost_micros > 0
              from upload_pipeline.usage_records order by tokens desc
            """
        ).fetchall()
    tried = ("openai", "text-embedding-3-small", "trial", 1)
    assert rows[0][4] > tokens, "of an answer that cannot be read only the bound is known"
    assert [(*row[:4], *row[5:]) for row in rows] == [(*tried, None, None, None, True)] * 5
    assert [row[4] for row in rows[1:]] == [tokens] * 4
    (used,) = terminal("usage", "--by", "user", "--json").lines()
    assert (used["user"], used["requests"]) == (None, 5)
    assert "(no user's)" in terminal("usage", "--by", "user").out
    with psycopg.connect(database.admin_url) as connection:
        # reserved and settled, each of them
        counted = "select calls from upload_pipeline.provider_budgets where model = 'text-embedding-3-small'"
        assert connection.execute(counted).fetchone() == (5,)


def test_a_model_is_not_tried_where_the_budget_has_no_room(terminal: Terminal) -> None:
    with running_simulator("tests.simulators.openai_embeddings") as url:
        terminal.environment.update(
            {
                "UPLOAD_PIPELINE_OPENAI_API_KEY": KEY,
                "UPLOAD_PIPELINE_OPENAI_BASE_URL": url,
                "UPLOAD_PIPELINE_OPENAI_REQUESTS_PER_MINUTE": "1",
            }
        )
        add = ("models", "add", "text-embedding-3-small", "--dimensions", "16")
        assert terminal(*add).status == 0
        refused = terminal(*add)
        assert refused.status != 0
        assert "not asked: the budget of requests is used up" in refused.err


def misbehave(url: str, fault: str, *, times: int = 1) -> None:
    """The simulator's next answers have this fault."""
    httpx.post(f"{url}/misbehave", json={"fault": fault, "times": times}).raise_for_status()


def test_jobs_of_a_filling_are_listed_where_they_are_asked_for(terminal: Terminal, admin: Any) -> None:
    terminal("models", "add", NEW)
    admin.execute("select upload_pipeline.enqueue_refills()")
    assert terminal("jobs", "--json").lines() == []
    (job,) = terminal("jobs", "--pipeline", "reembed", "--json").lines()
    assert (job["pipeline"], job["pool"], job["stage"], job["state"]) == ("reembed", "background", "queued", "queued")
    (document,) = terminal("documents", "--json").lines()
    assert UUID(document["document_id"])
    assert document["job_id"] is None
    assert "1 job of its filling is cancelled" in terminal("models", "retire", NEW).out


def test_the_status_tells_that_the_provider_fails(terminal: Terminal, admin: Any) -> None:
    terminal("models", "add", NEW)
    admin.execute("select upload_pipeline.note_model_failure(%s, 'The embedder failed (500): busy.')", [NEW])
    told = terminal("models", "status")
    assert re.search(r"its provider failed at \d\d:\d\d", table(told)[NEW])
    assert f"The filling of {NEW} waits for its provider: The embedder failed (500): busy." in told.err
    terminal("models", "retire", NEW)
    terminal("models", "add", NEW)
    assert "waits for" not in terminal("models", "status").err
