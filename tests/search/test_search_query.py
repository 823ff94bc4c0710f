"""Searching as a user: what comes back, whose it is, and what is refused."""

from __future__ import annotations

import asyncio
import json
from uuid import UUID, uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.search import query_models
from upload_pipeline.search.query import SearchMode, search
from upload_pipeline.search.query_models import QueryModels
from upload_pipeline.settings import load_settings

MARKDOWN = """# Policy

## Deductibles

The deductible for wind and hail is two percent of the dwelling limit.

## Liability

We pay damages for which the insured is legally liable, and provide a defence by a lawyer of our choice.
"""


async def find(db, models, user, query="deductible for hail", **more):
    return (await search(db, models, user_id=user, query=query, **more)).hits


@pytest.mark.parametrize("mode", list(SearchMode))
async def test_a_hit_says_where_it_stands(library, db, models, user, mode):
    document = await library.add(user, "policy.pdf", MARKDOWN, page_starts=(0,), metadata='{"year": 2024}')
    result = await search(db, models, user_id=user, query="deductible for hail", mode=mode, limit=1)
    (hit,) = result.hits
    assert (hit.document_id, hit.filename, hit.metadata) == (document, "policy.pdf", {"year": 2024})
    assert (hit.page, hit.page_to) == (1, 1)
    assert isinstance(hit.chunk_id, UUID)
    assert "wind and hail" in MARKDOWN[hit.start : hit.end]
    assert MARKDOWN[hit.start : hit.end] in hit.text
    assert hit.heading_path[0] == "Policy"
    assert hit.score > 0
    assert result.took_ms > 0


async def test_hits_come_best_first_and_no_more_than_asked_for(library, db, models, user):
    for number in range(8):
        await library.add(user, f"{number}.md", f"# Note {number}\n\n" + "hail " * number + "on the roof\n")
    hits = await find(db, models, user, query="hail", limit=5)
    assert len(hits) == 5
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits == await find(db, models, user, query="hail", limit=5)


async def test_nobody_finds_what_is_not_theirs(library, db, models, user):
    stranger = uuid4()
    document = await library.add(user, "policy.md", MARKDOWN)
    for mode in SearchMode:
        assert await find(db, models, stranger, mode=mode) == ()
        assert await find(db, models, stranger, mode=mode, document_ids=[document]) == ()
        assert await find(db, models, user, mode=mode)


async def test_users_who_search_at_once_over_few_connections_each_find_their_own(library, db, models):
    users = [uuid4() for _ in range(6)]
    for number, each in enumerate(users):
        await library.add(each, f"{number}.md", MARKDOWN + f"\nNumber {number}.\n")
    found = await asyncio.gather(*(find(db, models, each) for each in users * 4))
    for number, hits in enumerate(found):
        assert {hit.filename for hit in hits} == {f"{number % 6}.md"}


async def test_a_connection_goes_back_as_it_was(library, db, models, user):
    await library.add(user, "policy.md", MARKDOWN)
    await find(db, models, user)
    for _ in range(4):
        role, claims = await db.fetchrow(
            "select current_user::text, coalesce(current_setting('request.jwt.claims', true), '')"
        )
        assert (role, claims) == ("upload_worker", "")


async def test_chunks_that_are_not_live_and_documents_being_deleted_are_not_found(library, admin, db, models, user):
    await library.add(user, "new.md", MARKDOWN + "\nNot yet.\n", live=False)
    assert await find(db, models, user) == ()
    gone = await library.add(user, "gone.md", MARKDOWN)
    assert await find(db, models, user)
    await admin.execute("select upload_pipeline.begin_deletion($1)", gone)
    for mode in SearchMode:
        assert await find(db, models, user, mode=mode) == ()


async def test_hits_can_be_limited_to_documents(library, db, models, user):
    one = await library.add(user, "one.md", MARKDOWN + "\nOne.\n")
    await library.add(user, "two.md", MARKDOWN + "\nTwo.\n")
    assert {hit.document_id for hit in await find(db, models, user, document_ids=[one])} == {one}
    assert len({hit.document_id for hit in await find(db, models, user, document_ids=None)}) == 2
    assert await find(db, models, user, document_ids=[]) == ()


async def test_hits_can_be_limited_by_metadata(library, db, models, user):
    for year, tags in ((2023, ["a", "b"]), (2024, ["b"])):
        text = MARKDOWN + f"\nOf {year}.\n"
        await library.add(user, f"{year}.md", text, metadata=json.dumps({"year": year, "tags": tags}))

    async def names(metadata_filter):
        return {hit.filename for hit in await find(db, models, user, metadata_filter=metadata_filter)}

    assert await names({"year": 2024}) == {"2024.md"}
    assert await names({"tags": ["b"]}) == {"2023.md", "2024.md"}
    assert await names({"tags": ["a"]}) == {"2023.md"}
    assert await names({"year": "2024"}) == set()
    assert await names({}) == {"2023.md", "2024.md"}


@pytest.mark.parametrize(
    "query", ["'; drop table documents; --", "a & | ! ( : * <->", "hail\n\n", "%_\\", "の", "the of and"]
)
async def test_any_text_is_a_query(library, db, models, user, query):
    await library.add(user, "policy.md", MARKDOWN)
    for mode in SearchMode:
        await find(db, models, user, query=query, mode=mode)


async def test_a_query_of_words_that_say_nothing_finds_nothing_by_text_and_something_by_meaning(
    library, db, models, user
):
    await library.add(user, "policy.md", MARKDOWN)
    assert await find(db, models, user, query="the of and", mode="text") == ()
    assert await find(db, models, user, query="the of and", mode="vector")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query": ""}, "query"),
        ({"query": " \n\t"}, "query"),
        ({"query": "x" * 8001}, "8001"),
        ({"query": "a\0b"}, "NUL"),
        ({"query": "\ud800"}, "surrogates"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 1001}, "1000"),
        ({"limit": True}, "limit"),
        ({"mode": "fuzzy"}, "hybrid, vector, text"),
        ({"metadata_filter": {"a": object()}}, "metadata_filter"),
        ({"metadata_filter": {"a": "b\0"}}, "metadata_filter"),
        ({"metadata_filter": {"a": float("nan")}}, "metadata_filter"),
        ({"metadata_filter": [1]}, "metadata_filter"),
    ],
)
async def test_a_bad_argument_is_refused_by_name(db, models, user, change, named):
    with pytest.raises(PipelineError) as caught:
        await search(db, models, **{"user_id": user, "query": "hail", **change})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert named in caught.value.message
    assert not caught.value.retryable


async def change_model(admin, name, provider, dimensions):
    """Makes another model the active one, whatever it lacks."""
    await admin.execute("select upload_pipeline.add_model($1, $2, $3)", name, provider, dimensions)
    await admin.execute("update upload_pipeline.embedding_models set status = 'retired' where status = 'active'")
    await admin.execute("update upload_pipeline.embedding_models set status = 'active' where model = $1", name)


async def test_queries_are_embedded_by_the_active_model_whatever_the_settings_name(library, db, user, tmp_path):
    await library.add(user, "policy.md", MARKDOWN)
    named = load_settings(home=tmp_path, embedder="openai", openai_api_key="k", openai_base_url="http://127.0.0.1:9/v1")
    models = QueryModels(db, ProviderCalls(), named)
    with capture_logs() as logs:
        await models.start()
    (warning,) = [line["problem"] for line in logs if line["event"] == "embedding_model_differs"]
    assert "text-embedding-3-small" in warning
    assert "wordllama-256" in warning
    assert "models add" in warning
    assert await find(db, models, user, mode="vector")
    assert (await models.current()).name == "wordllama-256"
    await models.close()


async def test_a_query_whose_model_is_replaced_while_it_is_embedded_is_embedded_again(
    library, admin, db, models, user, monkeypatch
):
    await library.add(user, "policy.md", MARKDOWN)
    await find(db, models, user)
    embed, asked = LocalEmbedder.embed, []

    async def watched(self, texts):
        asked.append(self.model)
        vectors = await embed(self, texts)
        if len(asked) == 1:
            await change_model(admin, "wordllama-256@64", "local", 64)
            await admin.execute(
                """
                update upload_pipeline.document_chunks
                   set embed_model = 'wordllama-256@64', embedding = extensions.subvector(embedding, 1, 64)
                """
            )
        return vectors

    monkeypatch.setattr(LocalEmbedder, "embed", watched)
    assert await find(db, models, user, mode="vector")
    assert asked == ["wordllama-256", "wordllama-256@64"]
    assert await find(db, models, user, mode="vector")
    assert asked[2:] == ["wordllama-256@64"]


async def test_a_model_that_never_stays_is_told_and_not_waited_for(library, admin, db, models, user, monkeypatch):
    await library.add(user, "policy.md", MARKDOWN)
    embed, asked = LocalEmbedder.embed, []

    async def restless(self, texts):
        asked.append(self.model)
        vectors = await embed(self, texts)
        await change_model(
            admin,
            "wordllama-256@128" if self.dimensions != 128 else "wordllama-256@64",
            "local",
            128 if self.dimensions != 128 else 64,
        )
        return vectors

    monkeypatch.setattr(LocalEmbedder, "embed", restless)
    with pytest.raises(PipelineError, match="has changed 3 times") as caught:
        await find(db, models, user)
    assert caught.value.code is ErrorCode.EMBED_FAILED
    assert len(asked) == 3


async def test_an_active_model_that_cannot_be_opened_is_named_unless_no_vector_is_needed(
    library, admin, db, models, user
):
    await library.add(user, "policy.md", MARKDOWN)
    await find(db, models, user)
    await change_model(admin, "text-embedding-3-small", "openai", 1536)
    for mode in ("hybrid", "vector"):
        with pytest.raises(PipelineError, match="OPENAI_API_KEY") as caught:
            await find(db, models, user, mode=mode)
        assert caught.value.code is ErrorCode.SETTING_INVALID
    assert await find(db, models, user, mode="text")


async def test_a_database_where_nothing_was_ever_embedded_finds_nothing_and_opens_one_embedder(
    db, models, user, monkeypatch
):
    open_embedder, opened = query_models.open_embedder, []
    monkeypatch.setattr(query_models, "open_embedder", lambda *of: opened.append(of) or open_embedder(*of))
    for _ in range(3):
        assert await find(db, models, user) == ()
    assert len(opened) == 1


async def test_vectors_of_a_model_that_is_not_active_are_left_out(library, admin, db, models, user):
    await library.add(user, "policy.md", MARKDOWN)
    await admin.execute("select upload_pipeline.add_model('other-8', 'local', 8)")
    await admin.execute(
        "update upload_pipeline.document_chunks set embed_model = 'other-8', embedding = '[1,0,0,0,0,0,0,0]'"
    )
    assert await find(db, models, user, mode="vector") == ()
    assert await find(db, models, user, mode="hybrid")


async def test_a_database_that_is_gone_is_named(db, models, user):
    await db.close()
    with pytest.raises(PipelineError) as caught:
        await find(db, models, user)
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE


async def test_a_database_without_the_schema_says_how_to_make_it(empty_database, models, user):
    pool = await asyncpg.create_pool(empty_database.admin_url, min_size=1, max_size=1)
    with pytest.raises(PipelineError) as caught:
        await find(pool, models, user)
    await pool.close()
    assert caught.value.code is ErrorCode.MIGRATIONS_PENDING


_CROWD = """
with document as (
  insert into upload_pipeline.documents (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
  values (gen_random_uuid(), $1, 'crowd.md', 'text/markdown', 1, repeat('a', 64), gen_random_uuid()::text)
  returning document_id, user_id)
insert into upload_pipeline.document_chunks
  (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
   section_ids, embed_model, embedding, live)
select gen_random_uuid(), d.document_id, d.user_id, n, 'deductible for wind and hail', repeat('b', 64), 'test@1', n,
       n + 1, '{}', '{}', c.embed_model, c.embedding, true
  from document d, generate_series(1, 3000) n,
       (select embed_model, embedding from upload_pipeline.document_chunks limit 1) c
"""


async def blocks_touched(connection: asyncpg.Connection, user: UUID, mode: str) -> int:
    """Blocks that one search touches, at a call late enough for Postgres to have settled on a plan."""
    async with connection.transaction(readonly=True):
        await connection.fetchval(
            "select set_config('role', 'authenticated', true), set_config('request.jwt.claims', $1, true)",
            json.dumps({"sub": str(user)}),
        )
        vector = json.dumps([1.0] * 256)
        call = (
            "explain (analyze, buffers, format json) select * from upload_pipeline.search_chunks("
            f"'deductible for wind and hail', '{vector}'::extensions.vector, 'wordllama-256', 10, '{mode}')"
        )
        for _ in range(8):
            (plan,) = json.loads(await connection.fetchval(call))
        return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


@pytest.mark.parametrize("mode", list(SearchMode))
async def test_rows_of_others_are_not_read(library, admin, worker, user, mode):
    await library.add(user, "policy.md", MARKDOWN)
    await admin.execute("vacuum analyze upload_pipeline.document_chunks, upload_pipeline.documents")
    alone = await blocks_touched(worker, user, mode)
    stranger = uuid4()
    await admin.execute(_CROWD, stranger)
    await admin.execute("vacuum analyze upload_pipeline.document_chunks, upload_pipeline.documents")
    # A few more levels of the indexes; the stranger's rows are some hundred blocks.
    assert await blocks_touched(worker, user, mode) <= alone + 30
    assert await blocks_touched(worker, stranger, mode) > alone + 300
