"""Each step's effect with its transition: asked twice, with a stale token, at another stage, cut off, started again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from document_steps import (
    FOUR,
    MODEL,
    accept,
    buffer_chunks,
    buffer_vectors,
    buffered,
    claim_accepted,
    commit_chunks,
    commit_embeddings,
    commit_markdown,
    commit_parse,
    lead,
    make_chunks,
    pending,
    result,
)
from sessions import Connect, Connection
from verbs import (
    STAGES,
    advance,
    advance_to,
    cancel,
    claim_one,
    job_row,
    retry,
    terminate,
    value,
)


@pytest.fixture
def lease(worker: Connection) -> Any:
    return claim_accepted(worker)


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
        (lambda c: c[-1].update(ordinal=4), "UP005"),
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
    def seen(db: Connection) -> tuple[list[str], list[str], int]:
        """The words of the live chunks and of the chunks that have nodes, and how many follow each other."""
        chunks = "select c.text from upload_pipeline.document_chunks c where c.live order by c.ordinal"
        nodes = """
            select c.text from upload_pipeline.document_nodes n
              join upload_pipeline.document_chunks c on c.chunk_id = n.node_id order by n.ordinal, c.text
        """
        followed = "select count(*) from upload_pipeline.document_edges where kind = 'next'"
        return (
            [row.text for row in db.execute(chunks).fetchall()],
            [row.text for row in db.execute(nodes).fetchall()],
            value(db, followed),
        )

    lead(worker, lease, FOUR)
    retry(worker, lease.job_id, "chunking")
    lease = claim_one(worker)
    reader = connect()
    old, new = list(FOUR), ["one", "changed", "and", "more", "so"]
    for stage in ("chunks_buffered", "chunked", "embedding", "embeddings_buffered"):
        lead(worker, lease, new, until=stage)
        lease = lease._replace(stage=stage)
        assert seen(reader) == (old, old, 3)
    with worker.transaction():
        commit_embeddings(worker, lease)
        assert seen(reader) == (old, old, 3)
        assert value(reader, "select state from upload_pipeline.upload_jobs") == "working"
    assert seen(reader) == (new, new, 4)
    assert value(reader, "select count(*) from upload_pipeline.document_chunks") == 5


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


def test_chunks_that_moved_keep_their_vectors_and_tell_where_they_stand_now(worker: Connection, lease: Any) -> None:
    """One goes, one moves, two stay: what goes is not taken for what moves, nor hides it."""
    lead(worker, lease, FOUR)
    query = "select text, start_offset, end_offset, heading_path, embedding::text from upload_pipeline.document_chunks"
    before = {row.text: row for row in worker.execute(query).fetchall()}
    retry(worker, lease.job_id, "chunking")
    lease = claim_one(worker)
    lead(worker, lease, (), until="chunking")
    chunks = make_chunks(lease.document_id, FOUR[:3])
    chunks[1] |= {"start_offset": 12, "end_offset": 19, "heading_path": ["C"]}
    buffer_chunks(worker, lease, chunks)
    lead(worker, lease._replace(stage="chunks_buffered"), ())
    after = {row.text: row for row in worker.execute(query).fetchall()}
    moved = before["two"]._replace(start_offset=12, end_offset=19, heading_path=["C"])
    assert after == {"one": before["one"], "two": moved, "three": before["three"]}


def test_a_set_whose_chunks_are_not_all_stored_is_refused_whole(
    admin: Connection, worker: Connection, lease: Any
) -> None:
    lead(worker, lease, FOUR, until="embeddings_buffered")
    admin.execute("delete from upload_pipeline.document_chunks where text = 'two'")
    with pytest.raises(psycopg.Error, match="1 of 4 buffered chunks lack a row") as refused:
        commit_embeddings(worker, lease)
    assert refused.value.sqlstate == "UP005"
    assert "Retry the job from stage" in str(refused.value.diag.message_hint)
    assert value(admin, "select count(*) from upload_pipeline.document_chunks where live") == 0
    assert buffered(worker) == (4, 4)


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


def test_advance_to_reaches_where_lead_does(worker: Connection, lease: Any) -> None:
    advance_to(worker, lease, "parsing")
    assert commit_parse(worker, lease, keep=False).state == "queued"
