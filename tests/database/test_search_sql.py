"""`search_chunks`: what it ranks first, what it refuses, and how much it reads."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connection
from verbs import add_document, user_number, value

USER, OTHER = user_number(1), user_number(2)


def add_chunk(
    admin: Connection,
    document: UUID,
    user: UUID,
    text: str,
    vector: str,
    ordinal: int,
    heading: str = "",
    model: str = "m3",
    live: bool = True,
) -> UUID:
    chunk = uuid4()
    admin.execute(
        """
        insert into upload_pipeline.document_chunks
          (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
           heading_path, section_ids, embed_model, embedding, live)
        values (%s, %s, %s, %s, %s, repeat('a', 64), 'c', 0, 4, %s, %s, %s, %s::text::extensions.vector, %s)
        """,
        [
            chunk,
            document,
            user,
            ordinal,
            text,
            [heading] * bool(heading),
            [uuid4()] * bool(heading),
            model,
            vector,
            live,
        ],
    )
    return chunk


@pytest.fixture
def library(admin: Connection) -> dict[str, UUID]:
    """Chunks by name; two documents of USER and one of OTHER."""
    admin.execute("select upload_pipeline.register_model('m3', 'test', 3), upload_pipeline.add_model('m2', 'test', 2)")
    fruit, ships, theirs = (add_document(admin, user) for user in (USER, USER, OTHER))
    admin.execute(
        'update upload_pipeline.documents set metadata = \'{"kind": "fruit"}\' where document_id = %s', [fruit]
    )
    return {
        "fruit": fruit,
        "ships": ships,
        "theirs": theirs,
        "apple": add_chunk(admin, fruit, USER, "An apple a day keeps the doctor away", "[1,0,0]", 0),
        "pear": add_chunk(admin, fruit, USER, "Pears are not apples", "[0.8,0.6,0]", 1),
        "sail": add_chunk(admin, ships, USER, "Sails catch the wind", "[0,1,0]", 0, heading="Rigging"),
        "hull": add_chunk(admin, ships, USER, "Rigging is above the hull", "[0,0,1]", 1),
        "draft": add_chunk(admin, ships, USER, "apple apple apple", "[1,0,0]", 2, live=False),
        "old": add_chunk(admin, ships, USER, "wind of another model", "[1,0]", 3, model="m2"),
        "foreign": add_chunk(admin, theirs, OTHER, "apple", "[1,0,0]", 0),
    }


def search(admin: Connection, query: str | None = "apple", vector: str | None = "[1,0,0]", **options: Any) -> list[Any]:
    given = {"p_model": "m3", **options}
    if isinstance(given.get("p_filter"), dict):
        given["p_filter"] = json.dumps(given["p_filter"])
    named = "".join(
        f", {k} => %({k})s" + {"p_document_ids": "::uuid[]", "p_filter": "::jsonb"}.get(k, "") for k in given
    )
    with admin.transaction(force_rollback=True):
        admin.execute("set local role authenticated")
        admin.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(USER)})])
        return admin.execute(
            f"""
            select * from upload_pipeline.search_chunks(
              p_query => %(query)s, p_embedding => %(vector)s::text::extensions.vector{named})
            """,
            {"query": query, "vector": vector, **given},
        ).fetchall()


def names(library: dict[str, UUID], hits: list[Any]) -> list[str]:
    by_id = {chunk: name for name, chunk in library.items()}
    return [by_id[hit.chunk_id] for hit in hits]


def test_vectors_rank_by_cosine_similarity(admin: Connection, library: dict[str, UUID]) -> None:
    hits = search(admin, p_mode="vector")
    assert names(library, hits)[:2] == ["apple", "pear"]
    assert [hit.score for hit in hits] == pytest.approx([1, 0.8, 0, 0], abs=1e-6)


def test_text_finds_word_forms_and_weighs_headings_more(admin: Connection, library: dict[str, UUID]) -> None:
    assert set(names(library, search(admin, "apples", None, p_mode="text"))) == {"apple", "pear"}
    assert names(library, search(admin, "rigging", None, p_mode="text")) == ["sail", "hull"]


def test_hybrid_sums_the_reciprocal_ranks(admin: Connection, library: dict[str, UUID]) -> None:
    found = search(admin, "rigging")
    hits = {name: hit.score for name, hit in zip(names(library, found), found, strict=True)}
    assert hits["apple"] == pytest.approx(1 / 11)
    assert hits["pear"] == pytest.approx(1 / 12)
    by_words = [name for name in hits if name in ("sail", "hull")]
    assert by_words[0] == "sail"
    assert hits["sail"] in [pytest.approx(1.5 / 11 + 1 / place) for place in (13, 14)]


def test_the_filters_narrow(admin: Connection, library: dict[str, UUID]) -> None:
    assert set(names(library, search(admin, p_document_ids=[library["ships"]], p_mode="vector"))) == {"sail", "hull"}
    assert search(admin, p_document_ids=[]) == []
    assert set(names(library, search(admin, p_filter={"kind": "fruit"}))) == {"apple", "pear"}
    assert search(admin, p_filter={"kind": "none"}) == []
    assert names(library, search(admin, p_limit=1, p_mode="vector")) == ["apple"]


def test_chunks_that_are_not_live_or_of_another_model_or_user_are_not_found(
    admin: Connection, library: dict[str, UUID]
) -> None:
    found = set(names(library, search(admin, "apple wind", p_limit=100)))
    assert found.isdisjoint({"draft", "foreign"})
    assert "old" not in names(library, search(admin, p_mode="vector"))
    admin.execute("update upload_pipeline.documents set deleted_at = now() where document_id = %s", [library["fruit"]])
    assert set(names(library, search(admin, p_mode="vector"))) == {"sail", "hull"}


@pytest.mark.parametrize("query", ["", "the of and", "& | ! ( : *", "'; drop table x; --", "word" * 2000, None])
def test_any_words_are_a_query(admin: Connection, library: dict[str, UUID], query: str | None) -> None:
    assert search(admin, query, None, p_mode="text") == []
    assert len(search(admin, query)) == 4


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"p_mode": "fuzzy"}, "22023"),
        ({"p_mode": None}, "22023"),
        ({"p_limit": 0}, "22023"),
        ({"p_limit": 1001}, "22023"),
        ({"p_limit": None}, "22023"),
        ({"vector": None}, "22023"),
        ({"vector": "[1,2]"}, "22000"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    admin: Connection, library: dict[str, UUID], options: dict[str, Any], state: str
) -> None:
    with pytest.raises(psycopg.Error) as error:
        search(admin, **options)
    assert error.value.sqlstate == state


def test_a_search_reads_the_callers_chunks_and_not_the_others(admin: Connection, library: dict[str, UUID]) -> None:
    """Behind 20,000 chunks of others, on a table that was never analysed."""
    admin.execute("alter table upload_pipeline.document_chunks set (autovacuum_enabled = off)")
    admin.execute(
        """
        insert into upload_pipeline.document_chunks
          (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
           section_ids, embed_model, embedding, live)
        select gen_random_uuid(), %s, %s, i, 'apple ' || i, repeat('a', 64), 'c', 0, 4, '{}', '{}', 'm3', '[1,0,0]',
               true
          from generate_series(1, 20000) i
        """,
        [library["theirs"], OTHER],
    )
    with admin.transaction(force_rollback=True):
        admin.execute("set local role authenticated")
        admin.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(USER)})])
        for _ in range(7):  # the first calls read the catalog, the later ones may get a generic plan
            plan = value(
                admin,
                """
                explain (analyze, buffers, format json)
                select * from upload_pipeline.search_chunks('apple', '[1,0,0]'::text::extensions.vector, 'm3')
                """,
            )[0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 300


def test_the_words_of_usual_chunks_are_read_in_the_row_and_at_the_first_look(
    admin: Connection, library: dict[str, UUID]
) -> None:
    """400 chunks of 2,000 characters each: less than a block for each, where words out of line take three more."""
    admin.execute(
        """
        insert into upload_pipeline.document_chunks
          (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
           section_ids, embed_model, embedding, live)
        select gen_random_uuid(), %s, %s, i + 10, t.text, repeat('a', 64), 'c', 0, 4, '{}', '{}', 'm3', '[1,0,0]', true
          from generate_series(1, 400) i
         cross join lateral (select string_agg(md5((i * 1000 + w)::text), ' ') as text from generate_series(1, 60) w) t
        """,
        [library["ships"], USER],
    )
    with admin.transaction(force_rollback=True):
        admin.execute("set local role authenticated")
        admin.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(USER)})])
        for _ in range(2):
            plan = value(
                admin,
                """
                explain (analyze, buffers, format json)
                select * from upload_pipeline.search_chunks('apple', '[1,0,0]'::text::extensions.vector, 'm3')
                """,
            )[0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 600


def test_a_query_of_very_many_words_weighs_each_of_them(admin: Connection, library: dict[str, UUID]) -> None:
    words = " ".join(f"w{i}x" for i in range(1200))
    assert search(admin, words, None, p_mode="text") == []
    assert set(names(library, search(admin, f"{words} it's-an/apple.html rigging", None, p_mode="text"))) >= {"sail"}
    alone = search(admin, "rigging apples", None, p_mode="text")
    among = search(admin, f"rigging {words} apples", None, p_mode="text")
    assert [(hit.chunk_id, hit.score) for hit in among] == [(hit.chunk_id, hit.score) for hit in alone]
