"""What follows a change of models: vectors that come home, and vectors that go with their model."""

from __future__ import annotations

from uuid import uuid4

from model_verbs import (
    NEW,
    OLD,
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
)
from sessions import Connect, Connection
from verbs import claim, job_row, set_clock, snooze, value


def test_the_new_vectors_come_home_and_the_old_ones_stay_for_the_grace_time(
    admin: Connection, worker: Connection, old: None
) -> None:
    documents = [add_chunks(admin) for _ in range(3)]
    add(worker)
    fill(worker)
    assert settle(worker) == (0, 0)
    activate(worker, grace="1 day")
    before = hits(admin, "[0,1]", NEW)
    # the second document in two parts: of each chunk a search finds the vector in one place or the other
    for moved in (4, 4, 1, 0):
        assert settle(worker, 4) == (moved, 0)
        assert hits(admin, "[0,1]", NEW) == before
        assert len(hits(admin, "[1,0,0]", OLD)) == 9
        half = value(
            worker,
            "select count(*) from upload_pipeline.chunk_vectors s join upload_pipeline.documents d using (document_id)"
            " where s.embed_model = %s and d.embed_model = %s",
            NEW,
            NEW,
        )
        assert half == 0, "a document is of the new model once all its vectors are"
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


def test_no_more_vectors_of_a_given_up_model_go_at_once_than_asked_for_whatever_the_statistics_say(
    admin: Connection, worker: Connection, old: None
) -> None:
    """Those of a table that was empty: joined to its own limit, the removal took all, and minutes for many."""
    admin.execute("alter table upload_pipeline.chunk_vectors set (autovacuum_enabled = off)")
    admin.execute("vacuum analyze upload_pipeline.chunk_vectors")
    for _ in range(3):
        add_chunks(admin, count=100)
    add(worker)
    fill(worker)
    retire(worker, NEW)
    assert [settle(worker, 100) for _ in range(4)] == [(0, 100), (0, 100), (0, 100), (0, 0)]


def test_a_document_that_is_written_for_long_holds_up_no_other_and_no_removal(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    first, _ = sorted(add_chunks(admin, count=6) for _ in range(2))
    add(worker)
    fill(worker)
    activate(worker, grace="1 day")
    set_clock(worker, 86_401)
    admin.execute("begin")
    admin.execute("select from upload_pipeline.documents where document_id = %s for update", [first])
    # of the first one alone there are more vectors than a call moves
    assert [settle(worker, 4) for _ in range(3)] == [(4, 0), (2, 0), (0, 0)]
    assert statuses(worker)[OLD] == "retired"
    admin.execute("commit")
    assert [settle(worker, 4) for _ in range(3)] == [(4, 0), (2, 0), (0, 0)]
    assert value(worker, "select count(*) from upload_pipeline.chunk_vectors") == 0


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
