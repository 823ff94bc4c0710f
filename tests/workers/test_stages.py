"""The steps with real documents: crashed in the middle and run again, alone and beside a zombie, the rows are equal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from sample_documents import KINDS, Kind, make_document

from upload_pipeline.database import documents, queue, sessions
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.documents import load_document
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.queue import Advance, ClaimedJob, Lease
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.ids import document_id as document_id_of
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.settings import load_settings
from upload_pipeline.stages import DOCUMENT_STAGES, Stage
from upload_pipeline.storage.document_objects import remove_document_objects
from upload_pipeline.storage.keys import markdown_prefix, parser_output_key, raw_key
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_pipeline.text.normalise import NormalisedMarkdown, normalise_markdown
from upload_workers.models_in_use import ModelsInUse
from upload_workers.pipelines import STEPS
from upload_workers.stages import check_markdown
from upload_workers.steps import Commit, Snooze, StepContext

TTL = timedelta(seconds=60)
USER = UUID("6f3c1d0e-5b1f-4e57-9d6e-0a6a5f3c2b11")
TYPES: dict[Kind, str] = {
    "pdf": "application/pdf",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "txt": "text/plain",
    "md": "text/markdown",
    "html": "text/html",
}
PATH = [row.stage for row in DOCUMENT_STAGES]

ROWS = {
    "documents": "select document_id, filename, markdown_key, markdown_sha256, page_count, page_starts, chunk_count,"
    " parser, chunker, embed_model, searchable_at is not null as searchable from upload_pipeline.documents",
    "chunks": "select chunk_id, ordinal, text, chunk_sha256, start_offset, end_offset, page_from, page_to,"
    " heading_path, section_ids, embed_model, embedding::text as embedding, live"
    " from upload_pipeline.document_chunks order by chunk_id",
    "nodes": "select node_id, kind, document_id from upload_pipeline.document_nodes order by node_id",
    "edges": "select source_id, kind, target_id from upload_pipeline.document_edges order by 1, 2, 3",
    "chunk buffer": "select count(*) from upload_pipeline.document_chunk_buffer",
    "vector buffer": "select count(*) from upload_pipeline.document_vector_buffer",
}


@dataclass(frozen=True)
class Line:
    """One document on its way through the steps, each run by hand."""

    context: StepContext
    admin: asyncpg.Connection
    document: UUID

    async def claim(self) -> ClaimedJob:
        (job,) = await queue.claim_jobs(
            self.context.db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL
        )
        return job

    async def run(self, job: ClaimedJob) -> ClaimedJob:
        """Runs the step of the job's stage and writes its outcome, as the runner does."""
        outcome = await STEPS[job.pipeline, job.stage](job, self.context)
        if isinstance(outcome, Commit):
            moved = await outcome.verb(self.context.db, job.lease, keep=True, ttl=TTL)
        else:
            following = PATH[PATH.index(Stage(job.stage)) + 1]
            asked = Advance(job.lease, job.stage, following, True)
            moved = (await queue.advance_jobs(self.context.db, [asked], ttl=TTL))[job.job_id]
        return replace(job, stage=moved.stage)

    async def run_to(self, job: ClaimedJob, stage: str) -> ClaimedJob:
        while job.stage != stage:
            job = await self.run(job)
        return job

    async def text_key(self) -> str:
        """Where the text is that the document's row names."""
        key: str = await self.admin.fetchval(
            "select markdown_key from upload_pipeline.documents where document_id = $1", self.document
        )
        return key

    async def rows(self) -> dict[str, list[dict[str, Any]]]:
        return {name: [dict(row) for row in await self.admin.fetch(query)] for name, query in ROWS.items()}

    async def take_over(self, job: ClaimedJob) -> ClaimedJob:
        """The job's lease ran out: another worker has it."""
        await self.admin.execute(
            "update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 s' where job_id = $1",
            job.job_id,
        )
        assert await queue.reap_expired(self.context.db) == 1
        await self.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where job_id = $1", job.job_id)
        assert await queue.promote_due(self.context.db) == 1
        return await self.claim()


@pytest.fixture(scope="module")
def parser() -> Any:
    parser = LocalParser(60.0, 1024**3)
    yield parser
    parser.close()


OpenLine = Callable[..., Awaitable[Line]]


@pytest.fixture
async def open_line(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, parser: LocalParser
) -> AsyncIterator[OpenLine]:
    """Puts a document's bytes in the store and its job in the queue."""
    settings = load_settings(home=tmp_path, database_url=database.worker_url, embed_batch_size=2)
    pool = await open_pool(database.worker_url, connection_options(settings), size=3)
    store = open_store(settings.effective_storage_url)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    models = ModelsInUse(pool, ProviderCalls(), settings)
    await models.start()

    async def begin(kind: Kind, data: bytes | None = None) -> Line:
        data = make_document(kind, seed=7, pages=4) if data is None else data
        digest = sha256(data).hexdigest()
        document = document_id_of(USER, digest)
        key = raw_key(USER, document)
        await store.put_bytes(key, data)
        await documents.accept_document(
            pool,
            document_id=document,
            user_id=USER,
            filename=f"claim.{kind}",
            media_type=TYPES[kind],
            file_bytes=len(data),
            file_sha256=digest,
            raw_key=key,
            metadata={},
        )
        return Line(StepContext(pool, store, parser, models, settings, scratch), admin, document)

    yield begin
    await models.close()
    await pool.close()


class Crash(BaseException):
    """The process ends here."""


class CrashingDatabase:
    """A database at which the process dies, before or after the statement that a word names."""

    def __init__(self, db: Any, word: str, *, after: bool, passes: int = 0) -> None:
        self._db, self._word, self._after, self._passes = db, word, after, passes

    async def _run(self, method: str, query: str, *args: Any) -> Any:
        hit = self._word in query
        if hit and self._passes:
            self._passes -= 1
            hit = False
        if hit and not self._after:
            raise Crash
        answer = await getattr(self._db, method)(query, *args)
        if hit:
            raise Crash
        return answer

    async def fetch(self, query: str, *args: Any) -> Any:
        return await self._run("fetch", query, *args)

    async def fetchrow(self, query: str, *args: Any) -> Any:
        return await self._run("fetchrow", query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        return await self._run("fetchval", query, *args)


@pytest.fixture
async def undisturbed(open_line: OpenLine) -> Any:
    """The rows of each kind of document that nothing happened to."""

    async def rows_of(kind: Kind) -> dict[str, list[dict[str, Any]]]:
        line = await open_line(kind)
        await line.run_to(await line.claim(), "embedded")
        rows = await line.rows()
        assert rows["chunks"]
        assert rows["documents"][0]["searchable"]
        assert rows["chunk buffer"][0]["count"] == rows["vector buffer"][0]["count"] == 0
        # from the start again, with nothing left of it
        await documents.begin_deletion(line.context.db, line.document)
        await documents.finish_deletion(line.context.db, line.document)
        return rows

    return rows_of


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
        await queue.snooze_job(line.context.db, job.lease, delay=outcome.delay)
        return "snoozed"
    assert isinstance(outcome, Commit)
    return (await outcome.verb(line.context.db, job.lease, keep=True, ttl=TTL)).state


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
    with pytest.raises(PipelineError, match="away"):
        await fill(line)
    broken = False
    await line.admin.execute("update upload_pipeline.upload_jobs set lease_expires_at = now() where state = 'working'")
    await line.admin.fetchval("select upload_pipeline.reap_expired()")
    await line.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where state = 'retryable'")
    await line.admin.fetchval("select upload_pipeline.promote_due()")
    assert await fill(line) == "done"
    assert await line.admin.fetchval("select upload_pipeline.activate_model($1, '1 day')", NEW) == "wordllama-256"


async def test_a_filling_waits_while_it_is_paused_and_where_there_is_no_key(open_line: OpenLine) -> None:
    line = await open_line("md")
    await line.run_to(await line.claim(), "embedded")
    await line.admin.execute("select upload_pipeline.add_model('text-embedding-3-small', 'openai', 1536)")
    await line.admin.fetchval("select upload_pipeline.enqueue_refills()")
    line.context.models.look_again()
    retries = "select retry_count from upload_pipeline.upload_jobs where state = 'retryable'"
    assert await fill(line) == "snoozed"
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
    assert await end_step(line, job) in ("snoozed", "retryable")
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
    assert (await outcome.verb(line.context.db, job.lease, keep=True, ttl=TTL)).state == "retryable"
    assert [tuple(row) for row in await line.admin.fetch(OPEN_JOBS)] == [("retryable", 0)]


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
