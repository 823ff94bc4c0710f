"""Documents under way, and fillings, while the embedding model changes."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from document_line import TTL, USER, Line, OpenLine

from upload_pipeline.database import queue
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_workers.pipelines import STEPS
from upload_workers.steps import Commit, Snooze

NEW = "wordllama-256@64"


async def change_model(line: Line) -> None:
    await line.admin.execute("select upload_pipeline.add_model($1, 'local', 64)", NEW)
    await line.admin.execute("select upload_pipeline.activate_model($1, '1 day')", NEW)


async def fill(line: Line) -> str:
    """Does the document's job of pipeline `reembed`; its state."""
    (job,) = await queue.claim_jobs(
        line.context.db, worker_id=uuid4(), pool="background", limit=1, after_user=None, ttl=TTL
    )
    return await end_step(line, job)


async def end_step(line: Line, job: ClaimedJob) -> str:
    """Runs a step that snoozes or commits; the job's state."""
    outcome = await STEPS[job.pipeline, job.stage](job, line.context)
    if isinstance(outcome, Snooze):
        return await put_off(line, job, outcome)
    assert isinstance(outcome, Commit)
    written = await outcome.verb(line.context.db, job.lease, keep=True, ttl=TTL)
    if isinstance(written, Snooze):
        return await put_off(line, job, written)
    return written.state


async def put_off(line: Line, job: ClaimedJob, outcome: Snooze) -> str:
    """Snoozes a job, as the worker does; whether it is for others."""
    await queue.snooze_job(line.context.db, job.lease, delay=outcome.delay)
    return "snoozed" if outcome.lacking is None else "left to others"


async def wake(line: Line) -> None:
    await line.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where state = 'retryable'")
    assert await queue.promote_due(line.context.db) == 1
    line.context.models.look_again()


@pytest.mark.parametrize("stage", ["embedding", "embeddings_buffered"])
async def test_a_document_under_way_when_the_model_changes_ends_with_the_new_ones_vectors(
    open_line: OpenLine, stage: str
) -> None:
    line = await open_line("md")
    job = await line.run_to(await line.claim(), stage)
    await change_model(line)
    await line.run_to(job, "embedded")
    rows = await line.admin.fetch("select text, embed_model, embedding from upload_pipeline.document_chunks where live")
    assert {row["embed_model"] for row in rows} == {NEW}
    expected = await LocalEmbedder(64).embed([row["text"] for row in rows])
    assert np.abs(np.array([row["embedding"].to_numpy() for row in rows]) - expected).max() < 1e-3
    assert await line.admin.fetchval("select retry_count from upload_pipeline.upload_jobs") == 0


async def test_a_document_is_embedded_for_the_model_that_is_filled_as_well(open_line: OpenLine) -> None:
    line = await open_line("md")
    job = await line.run_to(await line.claim(), "embedding")
    await line.admin.execute("select upload_pipeline.add_model($1, 'local', 64)", NEW)
    line.context.models.look_again()
    await line.run_to(job, "embedded")
    beside = "select count(*) from upload_pipeline.chunk_vectors where embed_model = $1"
    chunks = await line.admin.fetchval("select count(*) from upload_pipeline.document_chunks where live")
    assert await line.admin.fetchval(beside, NEW) == chunks
    assert await line.admin.fetchval("select count(*) from upload_pipeline.upload_jobs where pipeline = 'reembed'") == 0


async def test_a_document_does_not_wait_for_a_model_that_is_filled_and_fails(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, broken = LocalEmbedder.embed, True

    async def sometimes(self: LocalEmbedder, texts: Any) -> Any:
        if broken and self.dimensions == 64:
            raise PipelineError(ErrorCode.EMBED_FAILED, "away")
        return await embed(self, texts)

    monkeypatch.setattr(LocalEmbedder, "embed", sometimes)
    line = await open_line("md")
    await line.admin.execute("select upload_pipeline.add_model($1, 'local', 64)", NEW)
    await line.run_to(await line.claim(), "embedded")
    assert await fill(line) == "snoozed"
    broken = False
    await wake(line)
    assert await fill(line) == "snoozed", "until the rest is over"
    building = await line.context.models.building()
    assert building is not None
    building[0].rest.end()
    await wake(line)
    assert await fill(line) == "done"
    assert await line.admin.fetchval("select upload_pipeline.activate_model($1, '1 day')", NEW) == "wordllama-256"


async def test_a_filling_waits_while_it_is_paused_and_where_there_is_no_key(open_line: OpenLine) -> None:
    line = await open_line("md")
    await line.run_to(await line.claim(), "embedded")
    await line.admin.execute("select upload_pipeline.add_model('text-embedding-3-small', 'openai', 1536)")
    await line.admin.fetchval("select upload_pipeline.enqueue_refills()")
    line.context.models.look_again()
    retries = "select retry_count from upload_pipeline.upload_jobs where state = 'retryable'"
    assert await fill(line) == "left to others"
    assert await line.admin.fetchval(retries) == 0
    await line.admin.execute("select upload_pipeline.retire_model('text-embedding-3-small')")
    await line.admin.execute("select upload_pipeline.add_model($1, 'local', 64, true)", NEW)
    line.context.models.look_again()
    await line.admin.fetchval("select upload_pipeline.enqueue_job($1, $2, 'reembed')", line.document, USER)
    assert await fill(line) == "snoozed"
    assert await line.admin.fetchval(retries) == 0
    await line.admin.execute("select upload_pipeline.pause_model($1, false)", NEW)
    assert await queue.promote_due(line.context.db) == 1
    line.context.models.look_again()
    assert await fill(line) == "done"


KEYLESS = "text-embedding-3-small"
OPEN_JOBS = "select state::text, retry_count from upload_pipeline.upload_jobs where finished_at is null"


@pytest.mark.parametrize("stage", ["embedding", "embeddings_buffered"])
async def test_a_worker_without_the_key_of_the_new_model_leaves_documents_to_others(
    open_line: OpenLine, stage: str
) -> None:
    line = await open_line("md")
    job = await line.run_to(await line.claim(), stage)
    await line.admin.execute("select upload_pipeline.add_model($1, 'openai', 1536)", KEYLESS)
    await line.admin.execute("select upload_pipeline.activate_model($1, '1 day')", KEYLESS)
    line.context.models.look_again()
    assert await end_step(line, job) == "left to others"
    assert [tuple(row) for row in await line.admin.fetch(OPEN_JOBS)] == [("retryable", 0)]
    await line.admin.execute("select upload_pipeline.activate_model('wordllama-256', '1 day')")
    await wake(line)
    await line.run_to(await line.claim(), "embedded")


async def test_a_filling_whose_model_was_replaced_by_one_without_a_key_is_left_to_others(open_line: OpenLine) -> None:
    line = await open_line("md")
    await line.run_to(await line.claim(), "embedded")
    await line.admin.execute("select upload_pipeline.add_model($1, 'local', 64)", NEW)
    await line.admin.fetchval("select upload_pipeline.enqueue_refills()")
    line.context.models.look_again()
    (job,) = await queue.claim_jobs(
        line.context.db, worker_id=uuid4(), pool="background", limit=1, after_user=None, ttl=TTL
    )
    outcome = await STEPS[job.pipeline, job.stage](job, line.context)
    assert isinstance(outcome, Commit)
    await line.admin.execute("select upload_pipeline.retire_model($1)", NEW)
    await line.admin.execute("select upload_pipeline.add_model($1, 'openai', 1536)", KEYLESS)
    written = await outcome.verb(line.context.db, job.lease, keep=True, ttl=TTL)
    assert isinstance(written, Snooze)
    assert await put_off(line, job, written) == "left to others"
    assert written.lacking is not None
    assert await written.lacking()
    assert [tuple(row) for row in await line.admin.fetch(OPEN_JOBS)] == [("retryable", 0)]
    await line.admin.execute("select upload_pipeline.retire_model($1)", KEYLESS)
    line.context.models.look_again()
    assert not await written.lacking()


async def test_a_filling_whose_model_was_given_up_embeds_nothing_more(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = await open_line("md")
    await line.run_to(await line.claim(), "embedded")
    await line.admin.execute("select upload_pipeline.add_model($1, 'local', 64)", NEW)
    await line.admin.fetchval("select upload_pipeline.enqueue_refills()")
    line.context.models.look_again()
    embed, asked = LocalEmbedder.embed, []

    async def watched(self: LocalEmbedder, texts: Any) -> Any:
        asked.extend(texts)
        await line.admin.execute("select upload_pipeline.retire_model($1)", NEW)
        return await embed(self, texts)

    monkeypatch.setattr(LocalEmbedder, "embed", watched)
    assert await fill(line) == "done"
    assert len(asked) == line.context.settings.embed_batch_size
