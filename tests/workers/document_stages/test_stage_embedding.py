"""The steps that embed, and a job whose session is claimed meanwhile."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import numpy as np
import pytest
from document_line import PATH, USER, Crash, CrashingDatabase, OpenLine
from pydantic import SecretStr
from sample_documents import make_document

from tests.simulators.openai_embeddings import KEY, OpenAISimulator
from upload_pipeline.database import documents, sessions
from upload_pipeline.database.documents import load_document
from upload_pipeline.database.queue import ClaimedJob, Lease
from upload_pipeline.errors import PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.storage.document_objects import remove_document_objects
from upload_workers.models_in_use import ModelsInUse
from upload_workers.pipelines import STEPS


async def test_embedder_is_asked_in_batches_and_only_for_what_is_not_there_yet(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    embed = LocalEmbedder.embed

    async def watched(self: LocalEmbedder, texts: Any) -> Any:
        asked.append(list(texts))
        return await embed(self, texts)

    line = await open_line("md", "\n\n".join(f"# Part {n}\n\n{'word ' * 300}" for n in range(7)).encode())
    job = await line.run_to(await line.claim(), "embedding")
    monkeypatch.setattr(LocalEmbedder, "embed", watched)
    crashing = CrashingDatabase(line.context.db, "buffer_vectors", after=True, passes=1)
    with pytest.raises(Crash):
        await replace(line, context=replace(line.context, db=crashing)).run(job)
    job = await line.run_to(await line.take_over(job), "embedded")
    chunks = await line.admin.fetchval("select count(*) from upload_pipeline.document_chunks where live")
    texts = [text for batch in asked for text in batch]
    assert chunks > 4
    assert len(texts) == len(set(texts)) == chunks
    assert max(len(batch) for batch in asked) == 2


async def test_two_at_once_on_one_document_leave_the_rows_of_one(open_line: OpenLine, undisturbed: Any) -> None:
    """A zombie that runs all of its steps beside the owner, step by step."""
    expected = await undisturbed("docx")
    line = await open_line("docx")
    zombie = await line.claim()
    owner = await line.take_over(zombie)
    while owner.stage != "embedded":
        shadow = replace(owner, lease=Lease(zombie.job_id, zombie.lease.token))
        results = await asyncio.gather(line.run(shadow), line.run(owner), return_exceptions=True)
        assert isinstance(results[0], KeyError | asyncpg.PostgresError | PipelineError), results[0]
        assert isinstance(results[1], ClaimedJob), results[1]
        owner = results[1]
    assert await line.rows() == expected


async def test_local_providers_are_recorded_only_where_that_is_asked_for(open_line: OpenLine) -> None:
    results = "select results::text from upload_pipeline.job_outcomes where job_id = $1"
    line = await open_line("pdf")
    job = await line.run_to(await line.claim(), "embedded")
    assert await line.admin.fetchval("select count(*) from upload_pipeline.usage_records") == 0
    assert "cost" not in json.loads(await line.admin.fetchval(results, job.job_id))

    asked = await open_line("pdf", make_document("pdf", seed=8, pages=3))
    settings = asked.context.settings.model_copy(update={"record_local_usage": True})
    asked = replace(asked, context=replace(asked.context, settings=settings))
    job = await asked.run_to(await asked.claim(), "embedded")
    cost = json.loads(await line.admin.fetchval(results, job.job_id))["cost"]
    assert (cost["usd"], cost["pages"], cost["tokens"]) == (0, 3, 0)
    assert cost["requests"] >= 2
    rows = await line.admin.fetch("select provider, operation, user_id, document_id from upload_pipeline.usage_records")
    assert {tuple(row) for row in rows} == {("local", name, USER, asked.document) for name in ("parse", "embed")}


async def test_vectors_are_those_of_the_texts(open_line: OpenLine) -> None:
    line = await open_line("md")
    await line.run_to(await line.claim(), "embedded")
    rows = await line.admin.fetch(
        "select text, embedding from upload_pipeline.document_chunks where live order by ordinal"
    )
    expected = await (await line.context.models.active()).embedder.embed([row["text"] for row in rows])
    stored = np.array([np.asarray(row["embedding"].to_numpy()) for row in rows])
    # stored as half floats
    assert np.abs(stored - expected).max() < 1e-3
    document = await load_document(line.context.db, line.document)
    assert document is not None


async def test_a_job_whose_session_is_claimed_at_any_moment_ends_done_and_its_deletion_leaves_no_object(
    open_line: OpenLine,
) -> None:
    """At each stage the step is run, the session claimed before its outcome is written, and the step run again."""
    for number, stage in enumerate(PATH[:-1]):
        line = await open_line("md", f"# Report {number}\n\nWater damage is covered up to 1,500 USD.\n".encode())
        user, session = uuid4(), f"{number:064x}"
        db, store = line.context.db, line.context.store
        await line.admin.execute(
            "insert into upload_pipeline.sessions (user_id, token_sha256, expires_at) values ($1, $2, now() + '1 h')",
            USER,
            session,
        )
        job = await line.run_to(await line.claim(), stage)
        await STEPS[job.pipeline, job.stage](job, line.context)
        claimed = await sessions.claim_session(db, session, user)
        assert claimed.documents == (line.document,), stage
        await line.run_to(job, "embedded")
        row = await line.admin.fetchrow("select * from upload_pipeline.upload_history")
        assert (row["user_id"], row["status"]) == (user, "completed"), stage
        for table in ("document_chunks", "document_nodes", "document_edges", "job_outcomes", "events"):
            owners = await line.admin.fetch(
                f"select distinct user_id from upload_pipeline.{table} where user_id is not null"
            )
            assert [row["user_id"] for row in owners] == [user], (stage, table)

        deleted = await documents.begin_deletion(db, line.document)
        assert deleted is not None
        await remove_document_objects(store, document_id=deleted.document_id, raw_key=deleted.raw_key)
        assert [info.key async for info in store.list()] == [], stage
        await documents.finish_deletion(db, line.document)
        await line.admin.execute("delete from upload_pipeline.sessions")
        await line.admin.execute("delete from upload_pipeline.events")


async def test_paid_vectors_that_are_forgotten_before_the_commit_are_made_again_there_and_no_others(
    open_line: OpenLine,
) -> None:
    line = await open_line("md", "\n\n".join(f"# Part {n}\n\n{'word ' * 300}" for n in range(7)).encode())
    await line.admin.execute("delete from upload_pipeline.embedding_models")
    async with OpenAISimulator() as simulator:
        settings = line.context.settings.model_copy(
            update={
                "embedder": "openai",
                "openai_api_key": SecretStr(KEY),
                "openai_base_url": simulator.url,
                "openai_dimensions": 16,
            }
        )
        models = ModelsInUse(line.context.db, ProviderCalls(), settings)
        await models.start()
        paid = replace(line, context=replace(line.context, settings=settings, models=models))
        job = await paid.run_to(await paid.claim(), "embeddings_buffered")
        chunks = await line.admin.fetchval("select count(*) from upload_pipeline.document_chunk_buffer")
        assert chunks > 4
        forgotten = await line.admin.execute(
            "delete from upload_pipeline.embedding_cache where text_sha256 in"
            " (select sha256(convert_to(text, 'UTF8')) from upload_pipeline.document_chunk_buffer where ordinal < 3)"
        )
        assert forgotten == "DELETE 3"
        await paid.run_to(job, "embedded")
        await models.close()
        assert sum(simulator.books.paid_again().values()) == 3
        assert sum(simulator.books.paid.values()) == chunks + 3
    assert await line.admin.fetchval("select count(*) from upload_pipeline.document_chunks where live") == chunks
