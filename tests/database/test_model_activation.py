"""A model becomes the active one, and no chunk is without a vector of the active one at any moment."""

from __future__ import annotations

import psycopg
import pytest
from document_steps import accept, buffer_vectors, commit_embeddings, lead, pending
from model_verbs import (
    FOUR,
    LACKING,
    NEW,
    OLD,
    USER,
    activate,
    add,
    add_chunks,
    commit_refill,
    enqueue_refills,
    fill,
    hits,
    pending_refill,
    refused,
    retire,
    settle,
    statuses,
    store,
    to_commit,
)
from sessions import Connect, Connection
from verbs import advance, await_lock_wait, claim_one, in_background, retry, set_clock, value


def test_activation_is_refused_with_a_count_until_every_live_chunk_has_its_vector(
    admin: Connection, worker: Connection, old: None
) -> None:
    documents = [add_chunks(admin) for _ in range(2)]
    refused(activate, worker, state="UP002")
    add(worker)
    error = refused(activate, worker, state="UP003", says='6 chunks of 2 documents have no vector of "m2" yet')
    assert "models status" in str(error.diag.message_hint)
    before = hits(admin, "[1,0,0]", OLD)
    refused(hits, admin, "[1,0]", NEW, state="UP002", says='"m2" do not serve searches, those of "m3" do')
    assert fill(worker) == 2
    assert hits(admin, "[1,0,0]", OLD) == before
    assert activate(worker) == OLD
    assert activate(worker) == NEW  # nothing to do
    assert statuses(worker) == {OLD: "retiring", NEW: "active"}
    assert len(hits(admin, "[0,1]", NEW)) == 6
    # who has not heard of it yet still finds what there was
    assert hits(admin, "[1,0,0]", OLD) == before
    assert {row.document_id for row in worker.execute("select document_id from upload_pipeline.documents")} == {
        *documents
    }
    codes = worker.execute(
        "select payload ->> 'status' as status from upload_pipeline.events where code = 'embedding_model_changed'"
        " order by event_id"
    ).fetchall()
    assert [row.status for row in codes] == ["building", "active"]


def test_going_back_is_one_step_while_nothing_new_has_come_and_a_short_filling_after(
    admin: Connection, worker: Connection, old: None
) -> None:
    add_chunks(admin)
    add(worker)
    fill(worker)
    activate(worker)
    assert activate(worker, OLD) == NEW
    assert activate(worker, NEW) == OLD
    accept(worker, USER)
    lease = claim_one(worker)
    lead(worker, lease, FOUR, until="embedding", model=NEW)
    buffer_vectors(worker, lease, pending(worker, lease.subject_id, NEW), ["[1,0]"] * 4, NEW)
    advance(worker, lease, "embedding", "embeddings_buffered")
    commit_embeddings(worker, lease, NEW)
    error = refused(activate, worker, OLD, state="UP003", says="4 chunks of 1 documents")
    assert "models add m3" in str(error.diag.message_hint)
    assert add(worker, OLD, 3) == "building"
    enqueue_refills(worker)
    back = claim_one(worker, pool="background")
    ids = pending_refill(worker, back.subject_id, OLD)
    assert len(ids) == 4
    store(worker, back, ids, "[1,0,0]", OLD)
    commit_refill(worker, back)
    assert activate(worker, OLD) == NEW
    assert len(hits(admin, "[1,0,0]", OLD)) == 7


def test_a_document_that_commits_first_is_seen_by_the_activation(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    add(worker)
    lease = to_commit(worker)
    operator = connect()
    worker.execute("begin")
    commit_embeddings(worker, lease)
    activation = in_background(activate, operator)
    await_lock_wait(admin, operator)
    worker.execute("commit")
    with pytest.raises(psycopg.Error, match="4 chunks of 1 documents"):
        activation.result(timeout=10)
    assert statuses(worker)[OLD] == "active"


def test_a_document_that_commits_after_the_activation_is_embedded_by_the_new_model_first(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    add(worker)
    lease = to_commit(worker)
    operator = connect()
    operator.execute("begin")
    activate(operator)
    commit = in_background(commit_embeddings, worker, lease)
    await_lock_wait(admin, worker)
    operator.execute("commit")
    with pytest.raises(psycopg.Error, match='the active embedding model is "m2"') as error:
        commit.result(timeout=10)
    assert error.value.sqlstate == "UP007"
    refused(commit_embeddings, worker, lease, NEW, state="UP007", says='4 of 4 buffered chunks lack a vector of "m2"')
    ids = pending(worker, lease.subject_id, NEW)
    buffer_vectors(worker, lease, ids, ["[1,0]"] * 4, NEW)
    assert commit_embeddings(worker, lease, NEW).state == "done"
    assert admin.execute(LACKING).fetchall() == []
    assert len(hits(admin, "[1,0]", NEW)) == 4
    # what was embedded before is not lost: going back needs nothing
    assert activate(worker, OLD) == NEW


def test_a_model_that_is_given_up_while_it_is_activated_stays_given_up(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    add_chunks(admin)
    add(worker)
    fill(worker)
    operator = connect()
    worker.execute("begin")
    assert retire(worker, NEW) == 0
    activation = in_background(activate, operator)
    await_lock_wait(admin, operator)
    worker.execute("commit")
    with pytest.raises(psycopg.Error, match='embedding model "m2" is retired') as error:
        activation.result(timeout=10)
    assert error.value.sqlstate == "UP003"
    assert statuses(worker) == {OLD: "active", NEW: "retired"}


def test_a_model_that_is_activated_while_it_is_given_up_stays_active(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    add_chunks(admin)
    add(worker)
    fill(worker)
    operator = connect()
    worker.execute("begin")
    assert activate(worker) == OLD
    giving_up = in_background(retire, operator, NEW)
    await_lock_wait(admin, operator)
    worker.execute("commit")
    with pytest.raises(psycopg.Error, match='embedding model "m2" is the active one'):
        giving_up.result(timeout=10)
    assert statuses(worker) == {OLD: "retiring", NEW: "active"}


def test_a_document_that_becomes_live_while_a_model_is_filled_has_vectors_of_both_or_a_job(
    admin: Connection, worker: Connection, old: None
) -> None:
    add(worker)
    lease = to_commit(worker)
    buffer_vectors(worker, lease, pending(worker, lease.subject_id, NEW), ["[1,0]"] * 4, NEW)
    commit_embeddings(worker, lease)
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs where pipeline = 'reembed'") == 0
    assert value(worker, "select count(*) from upload_pipeline.chunk_vectors") == 4
    late = to_commit(worker, content=b"more")
    buffer_vectors(worker, late, pending(worker, late.subject_id, NEW)[:3], ["[1,0]"] * 3, NEW)
    commit_embeddings(worker, late)
    job = claim_one(worker, pool="background")
    assert job.subject_id == late.subject_id
    assert len(pending_refill(worker, late.subject_id)) == 1
    store(worker, job, pending_refill(worker, late.subject_id))
    commit_refill(worker, job)
    activate(worker)
    assert len(hits(admin, "[0,1]", NEW)) == 8


def test_a_job_about_to_end_is_told_of_chunks_that_came_meanwhile(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    lease = to_commit(worker)
    commit_embeddings(worker, lease)
    add(worker)
    enqueue_refills(worker)
    refill = claim_one(worker, pool="background")
    store(worker, refill, pending_refill(worker, lease.subject_id))
    retry(worker, lease.job_id, "chunking")
    again = claim_one(worker)
    lead(worker, again, ("one", "new", "three", "four"), until="embeddings_buffered")
    other = connect()
    set_clock(other)
    worker.execute("begin")
    commit_embeddings(worker, again)
    ending = in_background(commit_refill, other, refill)
    await_lock_wait(admin, other)
    worker.execute("commit")
    with pytest.raises(psycopg.Error, match="lack a vector"):
        ending.result(timeout=10)
    assert len(pending_refill(worker, lease.subject_id)) == 1
    store(worker, refill, pending_refill(worker, lease.subject_id))
    assert commit_refill(worker, refill).state == "done"
    activate(worker)


@pytest.mark.parametrize("settled", [0, 2, 1000])
def test_a_document_processed_again_after_a_change_keeps_the_vectors_of_chunks_that_stay(
    admin: Connection, worker: Connection, old: None, settled: int
) -> None:
    lease = to_commit(worker)
    commit_embeddings(worker, lease)
    add(worker)
    fill(worker)
    activate(worker)
    if settled:
        settle(worker, settled)
    retry(worker, lease.job_id, "chunking")
    again = claim_one(worker)
    lead(worker, again, ("one", "new", "three", "four"), until="embedding", model=NEW)
    ids = pending(worker, lease.subject_id, NEW)
    assert len(ids) == 1
    buffer_vectors(worker, again, ids, ["[1,0]"], NEW)
    advance(worker, again, "embedding", "embeddings_buffered")
    assert commit_embeddings(worker, again, NEW).state == "done"
    assert sorted(hit.score for hit in hits(admin, "[0,1]", NEW)) == pytest.approx([0, 1, 1, 1])
    assert admin.execute(LACKING).fetchall() == []
