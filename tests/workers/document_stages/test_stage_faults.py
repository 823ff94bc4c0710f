"""The steps with real documents: crashed in the middle and run again, alone and beside a zombie, the rows are equal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import asyncpg
import pytest
from document_line import PATH, USER, Crash, CrashingDatabase, OpenLine
from sample_documents import KINDS, Kind

from upload_pipeline.database import documents, queue
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.document_objects import remove_document_objects
from upload_pipeline.storage.keys import markdown_prefix, parser_output_key, raw_key
from upload_pipeline.storage.store import ObjectStore
from upload_pipeline.text.normalise import NormalisedMarkdown, normalise_markdown
from upload_workers.pipelines import STEPS
from upload_workers.stages import check_markdown


@pytest.mark.parametrize("kind", KINDS)
async def test_every_step_run_twice_leaves_the_rows_of_one_run(
    open_line: OpenLine, undisturbed: Any, kind: Kind
) -> None:
    """At each stage the step is run to its outcome, which is thrown away with the process; then another runs it."""
    expected = await undisturbed(kind)
    line = await open_line(kind)
    job = await line.claim()
    while job.stage != "embedded":
        await STEPS[job.pipeline, job.stage](job, line.context)
        job = await line.take_over(job)
        job = await line.run(job)
    assert await line.rows() == expected
    assert list(line.context.scratch.iterdir()) == []


@pytest.mark.parametrize("after", [False, True], ids=["before the commit", "after the commit, answer lost"])
@pytest.mark.parametrize(
    ("stage", "word", "passes"),
    [
        ("parsing", "commit_parse", 0),
        ("parsed", "commit_markdown", 0),
        ("chunking", "buffer_chunks", 0),
        ("chunks_buffered", "commit_chunks", 0),
        ("embedding", "buffer_vectors", 0),
        ("embedding", "buffer_vectors", 1),
        ("embedding", "advance_jobs", 0),
        ("embeddings_buffered", "commit_embeddings", 0),
    ],
)
async def test_crash_at_the_write_of_a_step_changes_nothing_in_the_end(
    open_line: OpenLine, undisturbed: Any, stage: str, word: str, passes: int, after: bool
) -> None:
    expected = await undisturbed("pdf")
    line = await open_line("pdf")
    job = await line.run_to(await line.claim(), stage)
    crashing = CrashingDatabase(line.context.db, word, after=after, passes=passes)
    with pytest.raises(Crash):
        await replace(line, context=replace(line.context, db=crashing)).run(job)
    if await line.admin.fetchval("select state from upload_pipeline.upload_jobs") == "working":
        job = await line.take_over(job)
        await line.run_to(job, "embedded")
    assert await line.rows() == expected


@pytest.mark.parametrize("stage", [stage for stage in PATH if stage != "embedded"])
async def test_zombie_at_any_stage_writes_nothing_once_another_has_the_job(open_line: OpenLine, stage: str) -> None:
    line = await open_line("md")
    zombie = await line.run_to(await line.claim(), stage)
    await line.take_over(zombie)
    before = await line.rows()
    with pytest.raises((asyncpg.PostgresError, KeyError)) as fenced:
        await line.run(zombie)
    if isinstance(fenced.value, asyncpg.PostgresError):
        assert fenced.value.sqlstate == queue.LEASE_LOST
    else:  # missing from the answer of advance_jobs
        assert fenced.value.args == (zombie.job_id,)
    assert await line.rows() == before


async def test_restart_from_any_stage_gives_the_same_rows(open_line: OpenLine, undisturbed: Any) -> None:
    expected = await undisturbed("html")
    line = await open_line("html")
    job = await line.run_to(await line.claim(), "embedded")
    for stage in PATH[:-1]:
        await line.admin.execute("select * from upload_pipeline.retry_job($1, $2)", job.job_id, str(stage))
        job = await line.run_to(await line.claim(), "embedded")
        assert await line.rows() == expected, stage


@pytest.mark.parametrize("stage", ["queued", "parsing"])
async def test_bytes_that_are_not_those_that_were_uploaded_are_refused(open_line: OpenLine, stage: str) -> None:
    line = await open_line("txt")
    job = await line.run_to(await line.claim(), stage)
    await line.context.store.put_bytes(raw_key(USER, line.document), b"something else")
    with pytest.raises(PipelineError, match=r"claim\.txt") as caught:
        await line.run(job)
    assert caught.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert list(line.context.scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("queued", raw_key),
        ("parsing", raw_key),
        ("parsed", parser_output_key),
        ("chunking", None),
    ],
)
async def test_missing_object_is_named(open_line: OpenLine, stage: str, key: Any) -> None:
    line = await open_line("txt")
    job = await line.run_to(await line.claim(), stage)
    await line.context.store.delete([key(USER, line.document) if key else await line.text_key()])
    with pytest.raises(PipelineError) as caught:
        await line.run(job)
    assert caught.value.code is ErrorCode.OBJECT_MISSING
    assert not caught.value.retryable
    if key is raw_key:  # a bucket's rule may have ended it
        assert "UPLOAD_PIPELINE_STORAGE_RAW_DAYS" in caught.value.message


async def test_markdown_that_was_changed_after_the_check_is_refused(open_line: OpenLine) -> None:
    line = await open_line("md")
    job = await line.run_to(await line.claim(), "chunking")
    await line.context.store.put_bytes(await line.text_key(), b"# Another text\n\nthat nobody checked")
    with pytest.raises(PipelineError) as caught:
        await line.run(job)
    assert caught.value.code is ErrorCode.CHECKSUM_MISMATCH


async def test_a_worker_of_another_release_that_lost_its_lease_overwrites_no_text(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = await open_line("md")
    lost = await line.run_to(await line.claim(), "parsed")
    held = await line.run(await line.take_over(lost))
    checked = await line.text_key()

    with monkeypatch.context() as other_release:
        other_release.setattr(check_markdown, "normalise_markdown", _normalise_otherwise)
        with pytest.raises(asyncpg.PostgresError) as fenced:
            await line.run(lost)
    assert fenced.value.sqlstate == queue.LEASE_LOST

    assert await line.text_key() == checked
    await line.run_to(held, "embedded")
    (row,) = (await line.rows())["documents"]
    text = await line.context.store.get_bytes(checked, 10**6)
    assert sha256(text).hexdigest() == row["markdown_sha256"]
    # What the other one wrote stands beside it, and goes with the document.
    texts = [info async for info in line.context.store.list(markdown_prefix(USER, line.document))]
    assert len(texts) == 2
    await remove_document_objects(line.context.store, document_id=line.document, raw_key=raw_key(USER, line.document))
    assert [info async for info in line.context.store.list()] == []


def _normalise_otherwise(text: str, *, paged: bool) -> NormalisedMarkdown:
    return normalise_markdown("Of another release.\n\n" + text, paged=paged)


async def test_text_with_nothing_in_it_is_refused(open_line: OpenLine) -> None:
    line = await open_line("txt", b"  \n \t \n")
    job = await line.run_to(await line.claim(), "parsed")
    with pytest.raises(PipelineError) as caught:
        await line.run(job)
    assert caught.value.code is ErrorCode.PARSE_EMPTY


async def test_document_that_is_deleted_under_way_is_named_and_its_job_fenced(open_line: OpenLine) -> None:
    line = await open_line("md")
    job = await line.run_to(await line.claim(), "parsed")
    await documents.begin_deletion(line.context.db, line.document)
    await documents.finish_deletion(line.context.db, line.document)
    with pytest.raises(PipelineError) as caught:
        await line.run(job)
    assert caught.value.code is ErrorCode.DOCUMENT_NOT_FOUND
    with pytest.raises(asyncpg.PostgresError) as fenced:
        await queue.fail_job(line.context.db, job.lease, code="X", message="x", retryable=True)
    assert fenced.value.sqlstate == queue.LEASE_LOST


class DeletingStore:
    """A store before whose next writing something happens; after it the writer may be cancelled."""

    def __init__(self, inner: ObjectStore, before: Callable[[], Awaitable[None]], cancel: bool) -> None:
        self._inner, self._before, self._cancel = inner, before, cancel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def put_bytes(self, key: str, data: bytes) -> None:
        await self._before()
        await self._inner.put_bytes(key, data)
        if self._cancel:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.Event().wait()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("stage", ["parsing", "parsed"])
async def test_text_that_is_stored_after_the_document_was_deleted_is_taken_out_again(
    open_line: OpenLine, stage: str, cancelled: bool
) -> None:
    line = await open_line("md")
    job = await line.run_to(await line.claim(), stage)
    db, store = line.context.db, line.context.store

    async def delete() -> None:
        deleted = await documents.begin_deletion(db, line.document)
        assert deleted is not None
        await remove_document_objects(store, document_id=deleted.document_id, raw_key=deleted.raw_key)
        await documents.finish_deletion(db, line.document)

    deleting: Any = DeletingStore(store, delete, cancelled)
    late = replace(line, context=replace(line.context, store=deleting))
    with pytest.raises(asyncio.CancelledError if cancelled else asyncpg.PostgresError):
        await asyncio.create_task(late.run(job))
    assert [info.key async for info in store.list()] == []


async def test_text_of_a_document_that_is_uploaded_anew_stays(open_line: OpenLine) -> None:
    line = await open_line("md")
    job = await line.run_to(await line.claim(), "parsing")
    db, store = line.context.db, line.context.store
    text_key = parser_output_key(USER, line.document)

    async def delete_and_upload() -> None:
        assert await documents.begin_deletion(db, line.document) is not None
        await documents.finish_deletion(db, line.document)
        await open_line("md")

    deleting: Any = DeletingStore(store, delete_and_upload, False)
    late = replace(line, context=replace(line.context, store=deleting))
    with pytest.raises(asyncpg.PostgresError):
        await late.run(job)
    assert text_key in [info.key async for info in store.list()]
