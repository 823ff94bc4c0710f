"""The verbs that carry a document: acceptance, each step's effect with its transition, restart, deletion, events."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4, uuid5

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    STAGES,
    advance,
    advance_to,
    await_lock_wait,
    cancel,
    claim_one,
    event_codes,
    in_background,
    job_row,
    retry,
    set_clock,
    terminate,
    value,
)

MODEL = "m3"
SECTION_A, SECTION_B = "A", "B"


def accept(db: Connection, user: UUID, content: bytes = b"bytes") -> Any:
    """The one row that `accept_document` answers; ids follow from user and content."""
    digest = sha256(content).hexdigest()
    document = uuid5(user, digest)
    return db.execute(
        "select * from upload_pipeline.accept_document(%s, %s, 'paper.md', 'text/markdown', %s, %s, %s, '{\"a\": 1}')",
        [document, user, len(content), digest, f"raw/{document}"],
    ).fetchone()


def make_chunks(document: UUID, texts: Sequence[str], chunker: str = "test@1") -> list[dict[str, Any]]:
    """Chunks of ten characters each, two to a section: A, A, A > B, A > B, A, A, ..."""
    chunks = []
    for ordinal, text in enumerate(texts):
        path = ["A"] if ordinal % 4 < 2 else ["A", "B"]
        digest = sha256(text.encode()).hexdigest()
        chunks.append(
            {
                "ordinal": ordinal,
                "chunk_id": str(uuid5(document, f"{chunker}/{ordinal}/{digest}")),
                "text": text,
                "chunk_sha256": digest,
                "chunker": chunker,
                "start_offset": ordinal * 10,
                "end_offset": ordinal * 10 + 10,
                "page_from": None,
                "page_to": None,
                "heading_path": path,
                "section_ids": [str(uuid5(document, "/".join(path[: i + 1]))) for i in range(len(path))],
            }
        )
    return chunks


def buffer_chunks(db: Connection, lease: Any, chunks: list[dict[str, Any]], keep: bool = True) -> Any:
    return db.execute(
        "select * from upload_pipeline.buffer_chunks(%s, %s, %s::jsonb, %s)",
        [lease.job_id, lease.lease_token, json.dumps(chunks), keep],
    ).fetchone()


def commit_chunks(db: Connection, lease: Any) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_chunks(%s, %s)", [lease.job_id, lease.lease_token]
    ).fetchone()


def commit_parse(db: Connection, lease: Any, keep: bool = True) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_parse(%s, %s, 'local@1', 3, '{one}', %s)",
        [lease.job_id, lease.lease_token, keep],
    ).fetchone()


def commit_markdown(db: Connection, lease: Any) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_markdown(%s, %s, 'parsed/x.md', repeat('b', 64), 40, '{0,20}')",
        [lease.job_id, lease.lease_token],
    ).fetchone()


def pending(db: Connection, document: UUID, model: str = MODEL) -> list[UUID]:
    rows = db.execute("select chunk_id from upload_pipeline.pending_vectors(%s, %s)", [document, model]).fetchall()
    return [row.chunk_id for row in rows]


def buffer_vectors(
    db: Connection, lease: Any, ids: Sequence[UUID], vectors: Sequence[str] | None = None, model: str = MODEL
) -> int:
    vectors = [f"[{i + 1},1,0]" for i in range(len(ids))] if vectors is None else vectors
    return int(
        value(
            db,
            "select upload_pipeline.buffer_vectors(%s, %s, %s, %s::uuid[], %s)",
            lease.job_id,
            lease.lease_token,
            model,
            list(ids),
            # a literal without a type: the function's own gives it one, and the role need not see the type's schema
            "{" + ",".join(f'"{vector}"' for vector in vectors) + "}",
        )
    )


def commit_embeddings(db: Connection, lease: Any, model: str = MODEL) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_embeddings(%s, %s, %s)", [lease.job_id, lease.lease_token, model]
    ).fetchone()


def lead(db: Connection, lease: Any, texts: Sequence[str], until: str = "embedded", model: str = MODEL) -> None:
    """Leads a claimed job on with the verbs that its steps call, up to a stage."""
    document = lease.document_id
    for here, there in itertools.pairwise(STAGES):
        if STAGES.index(here) < STAGES.index(lease.stage) or here == until:
            if here == until:
                return
            continue
        match here:
            case "parsing":
                commit_parse(db, lease)
            case "parsed":
                commit_markdown(db, lease)
            case "chunking":
                buffer_chunks(db, lease, make_chunks(document, texts))
            case "chunks_buffered":
                commit_chunks(db, lease)
            case "embedding":
                while ids := pending(db, document, model):
                    buffer_vectors(db, lease, ids, model=model)
                advance(db, lease, here, there)
            case "embeddings_buffered":
                commit_embeddings(db, lease, model)
            case _:
                advance(db, lease, here, there)


FOUR = ("one", "two", "three", "four")


@pytest.fixture
def lease(admin: Connection, worker: Connection) -> Any:
    """The one accepted document's job, claimed at second 0."""
    set_clock(worker)
    worker.execute("select upload_pipeline.register_model(%s, 'test', 3)", [MODEL])
    accept(worker, uuid4())
    return claim_one(worker)


def result(db: Connection) -> dict[str, list[Any]]:
    """All that a processed document leaves, times left out."""
    return {
        "chunks": db.execute(
            """
            select chunk_id, ordinal, text, start_offset, end_offset, heading_path, section_ids, embed_model,
                   embedding::text, live from upload_pipeline.document_chunks order by document_id, ordinal, chunk_id
            """
        ).fetchall(),
        "nodes": db.execute("select * from upload_pipeline.document_nodes order by node_id").fetchall(),
        "edges": db.execute(
            "select * from upload_pipeline.document_edges order by source_id, kind, target_id"
        ).fetchall(),
        "documents": db.execute(
            """
            select document_id, parser, page_count, warnings, markdown_key, markdown_sha256, markdown_chars,
                   page_starts, chunker, chunk_count, embed_model, searchable_at
              from upload_pipeline.documents order by 1
            """
        ).fetchall(),
    }


def buffered(db: Connection) -> tuple[int, int]:
    """Rows in the chunk and the vector buffer."""
    return (
        value(db, "select count(*) from upload_pipeline.document_chunk_buffer"),
        value(db, "select count(*) from upload_pipeline.document_vector_buffer"),
    )


# acceptance


def test_accepting_the_same_bytes_again_gives_the_document_and_job_there_are(worker: Connection) -> None:
    user = uuid4()
    first, again = accept(worker, user), accept(worker, user)
    assert (first.duplicate, again.duplicate) == (False, True)
    assert (first.document_id, first.job_id) == (again.document_id, again.job_id)
    assert accept(worker, user, b"other").document_id != first.document_id
    assert accept(worker, uuid4()).duplicate is False
    codes = worker.execute(
        "select code from upload_pipeline.events where document_id = %s order by event_id", [first.document_id]
    ).fetchall()
    assert [row.code for row in codes] == ["document_accepted", "job_enqueued"]


def test_two_acceptances_at_once_make_one_document(admin: Connection, worker: Connection, connect: Connect) -> None:
    user, other = uuid4(), connect()
    worker.execute("begin")
    first = accept(worker, user)
    second = in_background(accept, other, user)
    await_lock_wait(admin, other)
    worker.execute("commit")
    answer = second.result(timeout=10)
    assert (answer.document_id, answer.job_id, answer.duplicate) == (first.document_id, first.job_id, True)


def test_an_acceptance_whose_rival_dies_is_the_first(admin: Connection, worker: Connection, connect: Connect) -> None:
    user, victim = uuid4(), connect()
    victim.execute("begin")
    accept(victim, user)
    second = in_background(accept, worker, user)
    await_lock_wait(admin, worker)
    terminate(admin, victim)
    assert second.result(timeout=10).duplicate is False


@pytest.mark.parametrize(("size", "digest", "name"), [(0, "a" * 64, "x"), (1, "A" * 64, "x"), (1, "a" * 64, "")])
def test_a_document_that_cannot_be_leaves_no_row(worker: Connection, size: int, digest: str, name: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        worker.execute(
            "select upload_pipeline.accept_document(%s, %s, %s, 'text/plain', %s, %s, 'k')",
            [uuid4(), uuid4(), name, size, digest],
        )
    assert value(worker, "select count(*) from upload_pipeline.events") == 0


def test_a_duplicate_whose_jobs_are_gone_has_no_job(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    first = accept(worker, user)
    admin.execute("delete from upload_pipeline.upload_jobs")
    again = accept(worker, user)
    assert (again.document_id, again.job_id, again.duplicate) == (first.document_id, None, True)


# the steps


def test_a_document_led_through_has_its_rows_structure_and_no_buffers(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR)
    after = result(worker)
    assert [row.text for row in after["chunks"]] == list(FOUR)
    assert all(row.live and row.embed_model == MODEL and row.embedding for row in after["chunks"])
    assert buffered(worker) == (0, 0)
    document = after["documents"][0]
    assert (document.parser, document.page_count, document.page_starts, document.chunk_count) == (
        "local@1",
        3,
        [0, 20],
        4,
    )
    results = value(worker, "select results from upload_pipeline.job_outcomes")
    assert results == {
        "chunks": 4,
        "nodes_created": len(after["nodes"]),
        "edges_created": len(after["edges"]),
        "embed_model": MODEL,
    }
    assert (len(after["nodes"]), len(after["edges"])) == (1 + 2 + 4, 2 + 4 + 3)


def test_a_section_stands_where_its_first_chunk_stands(worker: Connection, lease: Any) -> None:
    lead(worker, lease, [f"text {i}" for i in range(200)])
    rows = worker.execute(
        "select title, level, ordinal from upload_pipeline.document_nodes where kind = 'section' order by level"
    ).fetchall()
    assert [tuple(row) for row in rows] == [("A", 1, 0), ("B", 2, 2)]


VERBS: dict[str, tuple[str, Any]] = {
    "commit_parse": ("parsing", commit_parse),
    "commit_markdown": ("parsed", commit_markdown),
    "buffer_chunks": ("chunking", lambda db, lease: buffer_chunks(db, lease, make_chunks(lease.document_id, FOUR))),
    "commit_chunks": ("chunks_buffered", commit_chunks),
    "buffer_vectors": (
        "embedding",
        lambda db, lease: (buffer_vectors(db, lease, pending(db, lease.document_id)), True)[1],
    ),
    "commit_embeddings": ("embeddings_buffered", commit_embeddings),
}


def everything(db: Connection) -> Any:
    return (
        result(db),
        buffered(db),
        db.execute("select stage, state, lease_token from upload_pipeline.upload_jobs").fetchall(),
        value(db, "select count(*) from upload_pipeline.events"),
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_step_with_a_stale_token_changes_nothing(worker: Connection, lease: Any, verb: str) -> None:
    stage, call = VERBS[verb]
    lead(worker, lease, FOUR, until=stage)
    cancel(worker, lease.job_id)
    retry(worker, lease.job_id, force=True)
    claim_one(worker)
    before = everything(worker)
    with pytest.raises(psycopg.Error) as error:
        call(worker, lease)
    assert error.value.sqlstate == "UP001"
    assert everything(worker) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_step_cut_off_before_its_commit_changes_nothing_and_can_be_done_again(
    admin: Connection, worker: Connection, connect: Connect, lease: Any, verb: str
) -> None:
    stage, call = VERBS[verb]
    lead(worker, lease, FOUR, until=stage)
    before = everything(worker)
    victim = connect()
    victim.execute("begin")
    call(victim, lease)
    terminate(admin, victim)
    assert everything(worker) == before
    assert call(worker, lease)


@pytest.mark.parametrize("verb", VERBS)
def test_a_step_whose_answer_was_lost_answers_the_same_again(worker: Connection, lease: Any, verb: str) -> None:
    stage, call = VERBS[verb]
    lead(worker, lease, FOUR, until=stage)
    first = call(worker, lease)
    before = everything(worker)
    assert call(worker, lease) == first
    assert everything(worker) == before


HANDED_ON = {
    "commit_parse": ("commit_parse(%s, %s, 'local@1', 3, '{}', false)", "parsed"),
    "commit_markdown": ("commit_markdown(%s, %s, 'k', repeat('a', 64), 9, '{}', false)", "parse_validated"),
    "buffer_chunks": ("buffer_chunks(%s, %s, %s::jsonb, false)", "chunks_buffered"),
    "commit_chunks": ("commit_chunks(%s, %s, false)", "chunked"),
}
"""What hands the job on as it ends the step, and the stage that it goes to."""


@pytest.mark.parametrize("verb", HANDED_ON)
def test_a_step_that_hands_the_job_on_answers_the_same_again_until_another_has_it(
    worker: Connection, lease: Any, verb: str
) -> None:
    lead(worker, lease, FOUR, until=VERBS[verb][0])
    call, stage = HANDED_ON[verb]
    given = [lease.job_id, lease.lease_token]
    if verb == "buffer_chunks":
        given.append(json.dumps(make_chunks(lease.document_id, FOUR), default=str))
    first = worker.execute(f"select * from upload_pipeline.{call}", given).fetchone()
    assert (first.stage, first.state, first.lease_expires_at) == (stage, "queued", None)
    before = everything(worker)
    assert worker.execute(f"select * from upload_pipeline.{call}", given).fetchone() == first
    assert everything(worker) == before
    claim_one(worker)
    with pytest.raises(psycopg.Error) as error:
        worker.execute(f"select * from upload_pipeline.{call}", given)
    assert error.value.sqlstate == "UP001"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "buffer_vectors"])
def test_a_step_at_another_stage_changes_nothing(worker: Connection, lease: Any, verb: str) -> None:
    lead(worker, lease, FOUR, until="chunked" if verb not in ("commit_chunks", "commit_embeddings") else "chunking")
    before = everything(worker)
    with pytest.raises(psycopg.Error) as error:
        VERBS[verb][1](worker, lease)
    assert error.value.sqlstate in ("UP004", "UP005")
    assert everything(worker) == before


def test_chunks_buffered_anew_replace_what_an_earlier_try_had_buffered(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR, until="chunking")
    buffer_chunks(worker, lease, make_chunks(lease.document_id, FOUR))
    retry(worker, lease.job_id, "chunking", force=True)
    assert buffered(worker) == (0, 0)
    lease = claim_one(worker)
    buffer_chunks(worker, lease, make_chunks(lease.document_id, ("only",)))
    assert value(worker, "select string_agg(text, ',') from upload_pipeline.document_chunk_buffer") == "only"


@pytest.mark.parametrize(
    ("harm", "state"),
    [
        (lambda c: c.clear(), "UP005"),
        (lambda c: c[0].update(ordinal=1), "23505"),
        (lambda c: c[0].update(end_offset=0), "23514"),
        (lambda c: c[0].update(section_ids=[]), "23514"),
        (lambda c: c[0].update(page_from=1), "23514"),
        (lambda c: c[0].pop("text"), "23502"),
    ],
)
def test_chunks_that_do_not_fit_are_refused_and_change_nothing(
    worker: Connection, lease: Any, harm: Any, state: str
) -> None:
    lead(worker, lease, FOUR, until="chunking")
    chunks = make_chunks(lease.document_id, FOUR)
    harm(chunks)
    before = everything(worker)
    with pytest.raises(psycopg.Error) as error:
        buffer_chunks(worker, lease, chunks)
    assert error.value.sqlstate == state
    assert everything(worker) == before


def test_pending_vectors_come_in_document_order_and_bounded(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR, until="embedding")
    rows = worker.execute(
        "select text from upload_pipeline.pending_vectors(%s, %s, 3)", [lease.document_id, MODEL]
    ).fetchall()
    assert [row.text for row in rows] == ["one", "two", "three"]
    ids = pending(worker, lease.document_id)
    assert buffer_vectors(worker, lease, ids[:2]) == 2
    assert buffer_vectors(worker, lease, ids[:3]) == 1
    assert pending(worker, lease.document_id) == ids[3:]
    assert len(pending(worker, lease.document_id, "another")) == 4


def test_vectors_that_do_not_fit_are_refused(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR, until="embedding")
    ids = pending(worker, lease.document_id)
    cases: list[tuple[Sequence[UUID], list[str], str, str]] = [
        (ids[:1], ["[1,2]"], MODEL, "UP005"),
        (ids[:2], ["[1,2,3]"], MODEL, "UP005"),
        (ids[:1], ["[1,2,3]"], "nonesuch", "UP002"),
    ]
    for chosen, vectors, model, state in cases:
        with pytest.raises(psycopg.Error) as error:
            buffer_vectors(worker, lease, chosen, vectors, model)
        assert error.value.sqlstate == state
    assert buffer_vectors(worker, lease, [uuid4()]) == 0
    assert buffer_vectors(worker, lease, []) == 0
    assert buffer_vectors(worker, lease, [ids[0], ids[0]]) == 1


def test_vectors_of_another_documents_chunks_are_left_out(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR, until="embedding")
    accept(worker, uuid4())
    other = claim_one(worker)
    lead(worker, other, FOUR, until="embedding")
    assert buffer_vectors(worker, other, pending(worker, lease.document_id)) == 0
    assert len(pending(worker, lease.document_id)) == 4


def test_a_set_that_lacks_a_vector_does_not_become_live(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR, until="embedding")
    buffer_vectors(worker, lease, pending(worker, lease.document_id)[:3])
    advance(worker, lease, "embedding", "embeddings_buffered")
    before = everything(worker)
    with pytest.raises(psycopg.Error, match="1 of 4") as error:
        commit_embeddings(worker, lease)
    assert error.value.sqlstate == "UP007"
    assert everything(worker) == before


def test_readers_see_the_old_set_until_the_new_one_is_committed(
    worker: Connection, connect: Connect, lease: Any
) -> None:
    def live(db: Connection) -> list[str]:
        rows = db.execute("select text from upload_pipeline.document_chunks where live order by ordinal").fetchall()
        return [row.text for row in rows]

    lead(worker, lease, FOUR)
    retry(worker, lease.job_id, "chunking")
    lease = claim_one(worker)
    reader = connect()
    new = ("one", "changed")
    for stage in ("chunks_buffered", "chunked", "embedding", "embeddings_buffered"):
        lead(worker, lease, new, until=stage)
        lease = lease._replace(stage=stage)
        assert live(reader) == list(FOUR)
    with worker.transaction():
        commit_embeddings(worker, lease)
        assert live(reader) == list(FOUR)
        assert value(reader, "select state from upload_pipeline.upload_jobs") == "working"
    assert live(reader) == list(new)
    assert value(reader, "select count(*) from upload_pipeline.document_chunks") == 2


def test_chunks_that_did_not_change_keep_their_rows_and_vectors(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR)
    query = "select text, xmin::text, ctid::text, embedding::text from upload_pipeline.document_chunks order by ordinal"
    before = {row.text: row for row in worker.execute(query).fetchall()}
    retry(worker, lease.job_id, "chunking")
    lease = claim_one(worker)
    lead(worker, lease, ("one", "two", "new", "four"), until="embedding")
    assert len(pending(worker, lease.document_id)) == 1
    lead(worker, lease._replace(stage="embedding"), (), until="embedded")
    after = {row.text: row for row in worker.execute(query).fetchall()}
    assert {text: after[text] for text in ("one", "two", "four")} == {
        text: before[text] for text in ("one", "two", "four")
    }
    assert set(after) == {"one", "two", "new", "four"}


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_restart_of_a_done_document_at_any_stage_ends_with_equal_rows(
    worker: Connection, lease: Any, stage: str
) -> None:
    lead(worker, lease, FOUR)
    before = result(worker)
    retry(worker, lease.job_id, stage)
    assert value(worker, "select count(*) from upload_pipeline.document_chunks where live") == 4
    lead(worker, claim_one(worker), FOUR)
    assert result(worker) == before
    assert buffered(worker) == (0, 0)
    assert job_row(worker, lease.job_id).state == "done"


def test_rows_of_a_try_that_never_went_live_go_with_the_next_one(worker: Connection, lease: Any) -> None:
    lead(worker, lease, ("lost", "lost too"), until="embedding")
    retry(worker, lease.job_id, "chunking", force=True)
    lead(worker, claim_one(worker), FOUR)
    assert [row.text for row in result(worker)["chunks"]] == list(FOUR)


# deletion


def test_a_deletion_hides_first_and_removes_later(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR)
    row = worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id]).fetchone()
    assert (row.document_id, row.user_id) == (lease.document_id, lease.user_id)
    assert worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id]).fetchone() == row
    with pytest.raises(psycopg.Error, match="being deleted") as error:
        accept(worker, lease.user_id)
    assert error.value.sqlstate == "UP003"
    unfinished = "select count(*) from upload_pipeline.unfinished_deletions(%s)"
    assert value(worker, unfinished, "2031-05-17 13:00+00") == 1
    assert value(worker, unfinished, "2031-05-17 12:00+00") == 0
    finish = "select upload_pipeline.finish_deletion(%s)"
    assert [value(worker, finish, lease.document_id) for _ in range(2)] == [True, False]
    for table in ("documents", "upload_jobs", "job_outcomes", "document_chunks", "document_nodes", "document_edges"):
        assert value(worker, f"select count(*) from upload_pipeline.{table}") == 0
    codes = worker.execute(
        "select code from upload_pipeline.events where document_id = %s", [lease.document_id]
    ).fetchall()
    assert [row.code for row in codes].count("document_deletion_started") == 1
    assert [row.code for row in codes].count("document_deleted") == 1
    assert accept(worker, lease.user_id).duplicate is False


def test_a_deletion_ends_the_live_job_and_fences_its_worker_off(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR, until="chunked")
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id])
    assert job_row(worker, lease.job_id).state == "cancelled"
    assert event_codes(worker, lease.job_id)[-1] == "job_cancelled"
    with pytest.raises(psycopg.Error) as error:
        advance(worker, lease, "chunked", "embedding")
    assert error.value.sqlstate == "UP001"


def test_what_is_not_being_deleted_is_not_removed(worker: Connection, lease: Any) -> None:
    assert value(worker, "select upload_pipeline.finish_deletion(%s)", lease.document_id) is False
    assert worker.execute("select * from upload_pipeline.begin_deletion(%s)", [uuid4()]).fetchall() == []
    assert job_row(worker, lease.job_id).state == "working"


def test_a_deletion_waits_for_the_results_being_written(
    admin: Connection, worker: Connection, connect: Connect, lease: Any
) -> None:
    lead(worker, lease, FOUR, until="embeddings_buffered")
    other = connect()
    worker.execute("begin")
    commit_embeddings(worker, lease)
    deleted = in_background(other.execute, "select * from upload_pipeline.begin_deletion(%s)", [lease.document_id])
    await_lock_wait(admin, other)
    worker.execute("commit")
    deleted.result(timeout=10)
    assert value(worker, "select deleted_at is not null from upload_pipeline.documents")
    assert job_row(worker, lease.job_id).state == "done"


# events by month


def partitions(admin: Connection) -> set[str]:
    rows = admin.execute(
        "select inhrelid::regclass::text as name from pg_catalog.pg_inherits "
        "where inhparent = 'upload_pipeline.events'::regclass"
    ).fetchall()
    return {row.name.removeprefix("upload_pipeline.") for row in rows}


def test_months_are_made_ahead_once(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    assert value(worker, "select upload_pipeline.ensure_event_partitions(2)") == 3
    assert value(worker, "select upload_pipeline.ensure_event_partitions(2)") == 0
    assert {"events_2031_05", "events_2031_06", "events_2031_07", "events_default"} <= partitions(admin)


def test_an_event_of_no_month_is_caught_and_moved_when_its_month_is_made(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    worker.execute("select upload_pipeline.record_event('worker_started')")
    assert value(admin, "select count(*) from upload_pipeline.events_default") == 1
    worker.execute("select upload_pipeline.ensure_event_partitions(0)")
    assert value(admin, "select count(*) from upload_pipeline.events_default") == 0
    assert value(admin, "select count(*) from upload_pipeline.events_2031_05") == 1


def test_an_event_that_is_being_written_while_its_month_is_made_is_moved_too(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    set_clock(worker)
    other = connect()
    set_clock(other)
    worker.execute("begin")
    worker.execute("select upload_pipeline.record_event('worker_started')")
    made = in_background(other.execute, "select upload_pipeline.ensure_event_partitions(0)")
    await_lock_wait(admin, other)
    worker.execute("commit")
    made.result(timeout=10)
    assert value(admin, "select count(*) from upload_pipeline.events_2031_05") == 1


def test_two_runs_at_once_make_each_month_once(admin: Connection, worker: Connection, connect: Connect) -> None:
    set_clock(worker)
    other = connect()
    set_clock(other)
    with worker.transaction():
        assert value(worker, "select upload_pipeline.ensure_event_partitions(1)") == 2
        second = in_background(value, other, "select upload_pipeline.ensure_event_partitions(1)")
        await_lock_wait(admin, other)
    assert second.result(timeout=10) == 0


def test_only_months_that_ended_before_are_dropped(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    worker.execute("select upload_pipeline.ensure_event_partitions(2)")
    dropped = admin.execute("select * from upload_pipeline.drop_event_partitions('2031-06-30 23:59+00')").fetchall()
    assert "events_2031_05" in {row[0] for row in dropped}
    assert {"events_2031_06", "events_2031_07", "events_default"} <= partitions(admin)
    assert "events_2031_05" not in partitions(admin)


def test_advance_to_reaches_where_lead_does(worker: Connection, lease: Any) -> None:
    advance_to(worker, lease, "parsing")
    assert commit_parse(worker, lease, keep=False).state == "queued"


# what a step reads


def test_pending_vectors_are_looked_up_by_key_whatever_the_statistics_say(
    admin: Connection, worker: Connection, lease: Any
) -> None:
    """Among 40,000 buffered vectors of others, never analysed, with the plan that a session keeps from its sixth call.

    Left to itself the planner then compares each chunk with each vector of the model: seconds a call.
    """
    for table in ("document_chunks", "document_chunk_buffer", "document_vector_buffer"):
        admin.execute(f"alter table upload_pipeline.{table} set (autovacuum_enabled = off)")
    lead(worker, lease, [f"text {i}" for i in range(600)], until="embedding")
    admin.execute("set session_replication_role = replica")
    admin.execute(
        """
        insert into upload_pipeline.document_vector_buffer (chunk_id, embed_model, document_id, embedding)
        select gen_random_uuid(), %s, lpad(to_hex(i / 400), 32, '0')::uuid, '[1,0,0]' from generate_series(1, 40000) i
        """,
        [MODEL],
    )
    row = admin.execute(
        "select prosrc, proconfig from pg_catalog.pg_proc where oid = 'upload_pipeline.pending_vectors'::regproc"
    ).fetchone()
    assert row is not None
    body = row.prosrc
    for place, name in enumerate(("p_document_id", "p_model", "p_limit"), start=1):
        body = body.replace(name, f"${place}")

    def plan() -> str:
        admin.execute("deallocate all")
        admin.execute(f"prepare body (uuid, text, integer) as {body}")
        lines = admin.execute(f"explain execute body ('{lease.document_id}', '{MODEL}', 256)").fetchall()
        return "\n".join(line[0] for line in lines)

    admin.execute("set plan_cache_mode = force_generic_plan")
    assert "Materialize" in plan(), "the trap that this test sets does not spring"
    for setting in row.proconfig:
        if setting.startswith("enable_"):
            admin.execute(f"set {setting}")
    assert "document_vector_buffer_pkey" in plan()
    assert "Materialize" not in plan()


def test_every_verb_that_joins_the_buffers_leaves_the_planner_only_keys(admin: Connection) -> None:
    rows = admin.execute(
        """
        select proname, proconfig from pg_catalog.pg_proc
         where pronamespace = 'upload_pipeline'::regnamespace
           and prosrc ~ '(join|exists [(]select from) upload_pipeline.document_(chunk|vector)_buffer'
        """
    ).fetchall()
    assert {row.proname for row in rows} >= {"pending_vectors", "place_vectors", "commit_embeddings"}
    needed = {f"enable_{way}=off" for way in ("seqscan", "bitmapscan", "hashjoin", "mergejoin", "material")}
    assert {row.proname for row in rows if not needed <= set(row.proconfig)} == set()
