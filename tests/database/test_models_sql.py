"""Embedding models: one takes another's place, and no chunk is without a vector of the active one at any moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from document_steps import accept, buffer_vectors, commit_embeddings, lead, pending
from sessions import Connect, Connection
from verbs import (
    add_document,
    advance,
    await_lock_wait,
    cancel,
    claim,
    claim_one,
    enqueue,
    fail,
    in_background,
    job_row,
    promote,
    retry,
    set_clock,
    snooze,
    user_number,
    value,
)

OLD, NEW = "m3", "m2"
USER = user_number(1)
FOUR = ("one", "two", "three", "four")
LACKING = """
select c.chunk_id from upload_pipeline.document_chunks c
 where c.live and c.embed_model <> (select model from upload_pipeline.embedding_models where status = 'active')
   and not exists (select from upload_pipeline.chunk_vectors s
                    where s.chunk_id = c.chunk_id
                      and s.embed_model = (select model from upload_pipeline.embedding_models where status = 'active'))
"""


def refused(call: Any, *arguments: Any, state: str, says: str | None = None) -> psycopg.Error:
    with pytest.raises(psycopg.Error, match=says) as caught:
        call(*arguments)
    assert caught.value.sqlstate == state
    return caught.value


def add(db: Connection, model: str = NEW, dimensions: int = 2, paused: bool = False) -> str:
    return str(value(db, "select upload_pipeline.add_model(%s, 'test', %s, %s)::text", model, dimensions, paused))


def activate(db: Connection, model: str = NEW, grace: str = "1 day") -> Any:
    return value(db, "select upload_pipeline.activate_model(%s, %s::interval)", model, grace)


def retire(db: Connection, model: str, now: bool = False) -> int:
    return int(value(db, "select upload_pipeline.retire_model(%s, %s)", model, now))


def enqueue_refills(db: Connection, limit: int = 500, most_open: int = 1000) -> tuple[int, bool]:
    row = db.execute("select * from upload_pipeline.enqueue_refills(%s, %s)", [limit, most_open]).fetchone()
    assert row is not None
    return row.jobs, row.more


def settle(db: Connection, limit: int = 1000) -> tuple[int, int]:
    row = db.execute("select * from upload_pipeline.settle_models(%s)", [limit]).fetchone()
    assert row is not None
    return row.moved, row.removed


def pending_refill(db: Connection, document: UUID, model: str = NEW) -> list[UUID]:
    rows = db.execute("select chunk_id from upload_pipeline.pending_refill(%s, %s)", [document, model]).fetchall()
    return [row.chunk_id for row in rows]


def store(db: Connection, lease: Any, ids: Sequence[UUID], vector: str = "[0,1]", model: str = NEW) -> int:
    return buffer_vectors(db, lease, ids, [vector] * len(ids), model)


def commit_refill(db: Connection, lease: Any) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_refill(%s, %s)", [lease.job_id, lease.lease_token]
    ).fetchone()


def statuses(db: Connection) -> dict[str, str]:
    rows = db.execute("select model, status::text from upload_pipeline.embedding_models").fetchall()
    return {row.model: row.status for row in rows}


def add_chunks(admin: Connection, user: UUID = USER, count: int = 3) -> UUID:
    """A searchable document whose chunks have vectors of OLD."""
    document = add_document(admin, user)
    admin.execute(
        """
        insert into upload_pipeline.document_chunks
          (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
           heading_path, section_ids, embed_model, embedding, live)
        select gen_random_uuid(), %s, %s, i, 'word ' || i, repeat('a', 64), 'c', 0, 4, '{}', '{}', 'm3', '[1,0,0]', true
          from generate_series(1, %s) i
        """,
        [document, user, count],
    )
    admin.execute(
        "update upload_pipeline.documents set embed_model = 'm3', chunk_count = %s, searchable_at = now()"
        " where document_id = %s",
        [count, document],
    )
    return document


def fill(db: Connection) -> int:
    """Does all the jobs that are there; how many."""
    done = 0
    while True:
        enqueue_refills(db)
        leases = claim(db, limit=10, pool="background")
        if not leases:
            return done
        for lease in leases:
            store(db, lease, pending_refill(db, lease.subject_id))
            assert commit_refill(db, lease).state == "done"
            done += 1


def hits(admin: Connection, vector: str, model: str, user: UUID = USER) -> list[Any]:
    with admin.transaction(force_rollback=True):
        admin.execute("set local role authenticated")
        admin.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(user)})])
        return admin.execute(
            """
            select chunk_id, score from upload_pipeline.search_chunks(
              '', %s::text::extensions.vector, %s, p_mode => 'vector')
            """,
            [vector, model],
        ).fetchall()


@pytest.fixture
def old(worker: Connection) -> None:
    """OLD is the active model."""
    set_clock(worker)
    worker.execute("select upload_pipeline.register_model(%s, 'test', 3)", [OLD])


# the registry


def test_the_first_model_is_the_active_one_and_a_worker_is_told_which_it_is(worker: Connection) -> None:
    for model, dimensions in (("a", 2), ("b", 3), ("a", 2)):
        row = worker.execute("select * from upload_pipeline.register_model(%s, 'test', %s)", [model, dimensions])
        assert tuple(row.fetchone() or ()) == ("a", "test", 2)
    assert statuses(worker) == {"a": "active"}


def test_a_model_with_other_dimensions_is_refused(worker: Connection) -> None:
    worker.execute("select upload_pipeline.register_model('a', 'test', 2)")
    refused(worker.execute, "select upload_pipeline.register_model('a', 'test', 3)", state="UP005")
    add(worker, "b", 2)
    refused(add, worker, "b", 3, state="UP005")
    retire(worker, "b")
    refused(add, worker, "z", 0, state="23514")


def test_two_first_models_at_once_leave_one_active(admin: Connection, worker: Connection, connect: Connect) -> None:
    other = connect()
    worker.execute("begin")
    worker.execute("select upload_pipeline.register_model('a', 'test', 2)")
    registered = in_background(other.execute, "select model::text from upload_pipeline.register_model('b', 'test', 2)")
    await_lock_wait(admin, other)
    worker.execute("commit")
    assert registered.result(timeout=10).fetchone() == ("a",)
    assert statuses(worker) == {"a": "active"}


def test_the_first_model_of_all_has_nothing_to_fill(worker: Connection) -> None:
    assert add(worker) == "active"
    assert statuses(worker) == {NEW: "active"}
    refused(add, worker, state="UP003", says="is the active one")


def test_one_model_at_a_time_is_filled(worker: Connection, old: None) -> None:
    assert add(worker) == "building"
    assert add(worker) == "building"
    error = refused(add, worker, "m5", 5, state="UP003", says='"m2" is being filled')
    assert "models retire m2" in str(error.diag.message_hint)
    retire(worker, NEW)
    assert add(worker, "m5", 5) == "building"


# the jobs


def test_jobs_are_made_for_documents_that_lack_vectors_and_no_others(
    admin: Connection, worker: Connection, old: None
) -> None:
    lacking = {add_chunks(admin) for _ in range(3)}
    add_document(admin, USER)  # never processed
    deleted = add_chunks(admin)
    admin.execute("update upload_pipeline.documents set deleted_at = now() where document_id = %s", [deleted])
    assert enqueue_refills(worker) == (0, False)
    add(worker)
    assert enqueue_refills(worker) == (3, False)
    jobs = worker.execute("select * from upload_pipeline.upload_jobs").fetchall()
    assert {job.document_id for job in jobs} == lacking
    assert {(job.pipeline, job.pool, job.stage, job.priority) for job in jobs} == {
        ("reembed", "background", "queued", -1)
    }
    # the walk rests, and then finds that all of them have a job
    assert enqueue_refills(worker) == (0, False)
    set_clock(worker, 31)
    assert enqueue_refills(worker) == (0, False)
    assert claim(worker) == []
    assert len(claim(worker, limit=9, pool="background")) == 2  # the user's cap there


def test_the_walk_goes_page_by_page_and_stops_while_enough_wait(
    admin: Connection, worker: Connection, old: None
) -> None:
    for _ in range(5):
        add_chunks(admin, uuid4())
    add(worker)
    assert enqueue_refills(worker, limit=2) == (2, True)
    assert enqueue_refills(worker, limit=2, most_open=2) == (0, False)
    assert enqueue_refills(worker, limit=2) == (2, True)
    assert enqueue_refills(worker, limit=2) == (1, False)
    assert value(worker, "select count(distinct document_id) from upload_pipeline.upload_jobs") == 5


def test_one_walk_at_a_time(admin: Connection, worker: Connection, connect: Connect, old: None) -> None:
    add_chunks(admin)
    add(worker)
    other = connect()
    set_clock(other)
    worker.execute("begin")
    assert enqueue_refills(worker) == (1, False)
    assert enqueue_refills(other) == (0, False)
    worker.execute("commit")
    assert fill(worker) == 1


def test_a_paused_model_gets_no_jobs_until_it_goes_on(admin: Connection, worker: Connection, old: None) -> None:
    add_chunks(admin)
    add(worker, paused=True)
    assert enqueue_refills(worker) == (0, False)
    worker.execute("select upload_pipeline.pause_model(%s, false)", [NEW])
    assert enqueue_refills(worker) == (1, False)
    worker.execute("select upload_pipeline.pause_model(%s, true)", [NEW])
    job = claim_one(worker, pool="background")
    snooze(worker, job, "60 seconds")
    assert promote(worker) == 0
    worker.execute("select upload_pipeline.pause_model(%s, false)", [NEW])
    assert promote(worker) == 1
    for model in (OLD, "nobody's"):
        refused(worker.execute, "select upload_pipeline.pause_model(%s, true)", [model], state="UP003")


def test_a_document_whose_job_failed_for_good_is_left_out_until_the_model_is_added_anew(
    admin: Connection, worker: Connection, old: None
) -> None:
    add_chunks(admin)
    add(worker)
    enqueue_refills(worker)
    fail(worker, claim_one(worker, pool="background"), retryable=False)
    set_clock(worker, 31)
    assert enqueue_refills(worker) == (0, False)
    overview = worker.execute("select * from upload_pipeline.model_overview where model = %s", [NEW]).fetchone()
    assert overview is not None
    assert (overview.failed_documents, overview.lacking_chunks, overview.open_jobs) == (1, 3, 0)
    set_clock(worker, 40)
    add(worker)
    assert fill(worker) == 1


def test_filling_is_no_job_that_a_user_asked_for(admin: Connection, worker: Connection, old: None) -> None:
    document = add_chunks(admin)
    add(worker)
    enqueue_refills(worker)
    open_jobs = "select upload_pipeline.count_open_jobs(%s, 10)"
    assert value(worker, open_jobs, USER) == 0
    lease = claim_one(worker, pool="background")
    assert value(worker, open_jobs, USER) == 0
    assert value(worker, "select upload_pipeline.bytes_at_work()") == 0
    with admin.transaction(force_rollback=True):
        admin.execute("set local role authenticated")
        admin.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(USER)})])
        assert value(admin, "select count(*) from upload_pipeline.upload_jobs") == 0
        assert value(admin, "select count(*) from upload_pipeline.job_overview") == 0
        assert value(admin, "select status from upload_pipeline.upload_history") == "completed"
    snooze(worker, lease)
    assert value(worker, open_jobs, USER) == 0
    enqueue(worker, document, USER)
    assert value(worker, open_jobs, USER) == 1


# filling


def test_a_filled_document_is_done_and_filling_it_twice_is_harmless(
    admin: Connection, worker: Connection, old: None
) -> None:
    document = add_chunks(admin)
    add(worker)
    enqueue_refills(worker)
    lease = claim_one(worker, pool="background")
    ids = pending_refill(worker, document)
    assert len(ids) == 3
    assert store(worker, lease, ids[:2]) == 2
    refused(commit_refill, worker, lease, state="UP007", says="lack a vector")
    assert pending_refill(worker, document) == ids[2:]
    assert store(worker, lease, ids) == 1
    assert commit_refill(worker, lease).state == "done"
    assert commit_refill(worker, lease).state == "done"
    refused(store, worker, lease, ids, state="UP001")
    assert value(worker, "select results ->> 'embed_model' from upload_pipeline.job_outcomes") == NEW
    assert value(worker, "select count(*) from upload_pipeline.chunk_vectors") == 3


def test_vectors_that_do_not_fit_are_refused_and_chunks_of_others_left_out(
    admin: Connection, worker: Connection, old: None
) -> None:
    document, strange = add_chunks(admin), add_chunks(admin)
    add(worker)
    enqueue(worker, document, USER, pipeline="reembed")
    lease = claim_one(worker, pool="background")
    ids = pending_refill(worker, document)
    refused(store, worker, lease, ids, "[1,2,3]", state="UP005")
    refused(store, worker, lease, ids, "[1,2]", "unheard", state="UP002")
    assert store(worker, lease, pending_refill(worker, strange)) == 0
    assert store(worker, lease, [uuid4()]) == 0
    retire(worker, NEW)
    assert store(worker, lease, ids) == 0
    assert commit_refill(worker, lease).state == "done"


def test_a_document_that_goes_takes_its_job_and_vectors_along(admin: Connection, worker: Connection, old: None) -> None:
    documents = [add_chunks(admin, uuid4()) for _ in range(2)]
    add(worker)
    enqueue_refills(worker)
    first = claim(worker, limit=1, pool="background")[0]
    store(worker, first, pending_refill(worker, first.subject_id))
    for document in documents:
        worker.execute("select * from upload_pipeline.begin_deletion(%s)", [document])
    assert claim(worker, limit=9, pool="background") == []
    refused(commit_refill, worker, first, state="UP001")
    assert activate(worker) == OLD  # what is being deleted lacks nothing
    for document in documents:
        worker.execute("select upload_pipeline.finish_deletion(%s)", [document])
    assert value(worker, "select count(*) from upload_pipeline.chunk_vectors") == 0
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs") == 0


# activation


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


def to_commit(db: Connection, user: UUID = USER, content: bytes = b"bytes") -> Any:
    """A document's job, one step before its chunks become live, with vectors of OLD."""
    accept(db, user, content)
    lease = claim_one(db)
    lead(db, lease, FOUR, until="embeddings_buffered")
    return lease


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


@pytest.mark.parametrize("settled", [False, True])
def test_a_document_processed_again_after_a_change_keeps_the_vectors_of_chunks_that_stay(
    admin: Connection, worker: Connection, old: None, settled: bool
) -> None:
    lease = to_commit(worker)
    commit_embeddings(worker, lease)
    add(worker)
    fill(worker)
    activate(worker)
    if settled:
        settle(worker)
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


# what follows a change


def test_the_new_vectors_come_home_and_the_old_ones_stay_for_the_grace_time(
    admin: Connection, worker: Connection, old: None
) -> None:
    documents = [add_chunks(admin) for _ in range(3)]
    add(worker)
    fill(worker)
    assert settle(worker) == (0, 0)
    activate(worker, grace="1 day")
    before = hits(admin, "[0,1]", NEW)
    assert settle(worker, 4) == (6, 0)  # two documents: as many as it takes
    assert hits(admin, "[0,1]", NEW) == before
    assert settle(worker, 4) == (3, 0)
    assert settle(worker) == (0, 0)
    assert hits(admin, "[0,1]", NEW) == before
    rows = admin.execute(
        "select distinct c.embed_model, s.embed_model as beside, s.embedding::text as vector"
        "  from upload_pipeline.document_chunks c join upload_pipeline.chunk_vectors s using (chunk_id)"
    ).fetchall()
    assert [tuple(row) for row in rows] == [(NEW, OLD, "[1,0,0]")]
    models = worker.execute("select distinct embed_model from upload_pipeline.documents").fetchall()
    assert [row.embed_model for row in models] == [NEW]
    assert activate(worker, OLD) == NEW
    assert len(hits(admin, "[1,0,0]", OLD)) == 9
    while settle(worker) != (0, 0):
        pass
    activate(worker, NEW, "1 day")
    set_clock(worker, 86_399)
    settle(worker)
    assert statuses(worker)[OLD] == "retiring"
    set_clock(worker, 86_401)
    moved, removed = settle(worker, 4)
    assert (moved, removed) == (0, 4)
    assert statuses(worker)[OLD] == "retired"
    while settle(worker, 4) != (0, 0):
        pass
    assert value(worker, "select count(*) from upload_pipeline.chunk_vectors") == 0
    assert len(hits(admin, "[0,1]", NEW)) == 9
    refused(activate, worker, OLD, state="UP003", says="is retired")
    refused(hits, admin, "[1,0,0]", OLD, state="UP002")
    assert len(documents) == 3


def test_old_vectors_that_never_left_the_rows_go_with_the_model(
    admin: Connection, worker: Connection, old: None
) -> None:
    add_chunks(admin)
    add(worker)
    fill(worker)
    activate(worker)
    retire(worker, OLD, now=True)
    assert len(hits(admin, "[0,1]", NEW)) == 3
    assert settle(worker) == (3, 0)
    assert value(worker, "select count(*) from upload_pipeline.chunk_vectors") == 0
    assert value(worker, "select array_agg(distinct embed_model) from upload_pipeline.document_chunks") == [NEW]


def test_a_document_that_is_being_written_is_settled_later(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    first, second = sorted(add_chunks(admin) for _ in range(2))
    add(worker)
    fill(worker)
    activate(worker)
    writer = connect()
    set_clock(writer)
    admin.execute("begin")
    admin.execute("select from upload_pipeline.documents where document_id = %s for update", [first])
    assert settle(writer) == (3, 0)
    admin.execute("commit")
    assert settle(writer) == (3, 0)
    assert second


def test_a_model_that_is_given_up_takes_its_jobs_and_vectors_along(
    admin: Connection, worker: Connection, old: None
) -> None:
    for _ in range(3):
        add_chunks(admin, uuid4())
    add(worker)
    enqueue_refills(worker)
    at_work, waits = claim(worker, limit=2, pool="background")
    store(worker, at_work, pending_refill(worker, at_work.subject_id))
    snooze(worker, waits)
    refused(retire, worker, OLD, state="UP003", says="is the active one")
    refused(retire, worker, "unheard", state="UP002")
    assert retire(worker, NEW) == 2
    assert retire(worker, NEW) == 0
    assert job_row(worker, waits.job_id).state == "cancelled"
    assert commit_refill(worker, at_work).state == "done"
    assert settle(worker) == (0, 3)
    assert value(worker, "select count(*) from upload_pipeline.chunk_vectors") == 0
    assert enqueue_refills(worker) == (0, False)


def test_a_grace_time_ends_early_only_by_name(admin: Connection, worker: Connection, old: None) -> None:
    add_chunks(admin)
    add(worker)
    fill(worker)
    activate(worker)
    error = refused(retire, worker, OLD, state="UP003", says="can be activated again until 2031-05-18")
    assert "--now" in str(error.diag.message_hint)
    assert retire(worker, OLD, now=True) == 0
    assert statuses(worker) == {OLD: "retired", NEW: "active"}


def test_a_job_that_is_cancelled_or_lost_is_made_again(admin: Connection, worker: Connection, old: None) -> None:
    add_chunks(admin)
    add(worker)
    enqueue_refills(worker)
    cancel(worker, claim_one(worker, pool="background").job_id)
    set_clock(worker, 100)
    assert value(worker, "select upload_pipeline.reap_expired()") == 1
    assert fill(worker) == 1
    activate(worker)


def test_the_overview_tells_how_far_it_is_and_how_long_it_takes(
    admin: Connection, worker: Connection, old: None
) -> None:
    for _ in range(4):
        add_chunks(admin, uuid4(), count=5)
    add(worker)
    enqueue_refills(worker)
    set_clock(worker, 10)
    lease = claim(worker, limit=1, pool="background")[0]
    store(worker, lease, pending_refill(worker, lease.subject_id))

    def overview(model: str) -> Any:
        return worker.execute("select * from upload_pipeline.model_overview where model = %s", [model]).fetchone()

    found = overview(NEW)
    assert (found.chunks, found.filled_chunks, found.lacking_chunks, found.lacking_documents) == (20, 5, 15, 3)
    assert (found.vectors, found.open_jobs, found.failed_documents) == (5, 4, 0)
    assert found.chunks_per_second == pytest.approx(0.5)
    assert found.time_left.total_seconds() == pytest.approx(30)
    old_one = overview(OLD)
    assert (old_one.filled_chunks, old_one.lacking_chunks, old_one.vectors) == (20, 0, 20)
    assert (old_one.chunks_per_second, old_one.time_left) == (None, None)
    worker.execute("select upload_pipeline.pause_model(%s, true)", [NEW])
    assert overview(NEW).time_left is None
