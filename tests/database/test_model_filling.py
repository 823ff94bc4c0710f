"""A model is filled: the jobs that are made for it, what they do, and how far it is."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from model_verbs import (
    NEW,
    OLD,
    USER,
    activate,
    add,
    add_chunks,
    commit_refill,
    enqueue_refills,
    fill,
    pending_refill,
    refused,
    retire,
    store,
)
from sessions import Connect, Connection
from verbs import add_document, cancel, claim, claim_one, enqueue, fail, promote, set_clock, snooze, value

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


def test_jobs_that_are_put_off_or_at_work_count_among_those_that_are_enough(
    admin: Connection, worker: Connection, old: None
) -> None:
    for _ in range(6):
        add_chunks(admin, uuid4())
    add(worker)
    assert enqueue_refills(worker, limit=2, most_open=2) == (2, True)
    first, second = claim(worker, limit=2, pool="background")
    assert enqueue_refills(worker, limit=2, most_open=2) == (0, False)
    snooze(worker, first, "600 seconds")
    snooze(worker, second, "600 seconds")
    # a provider that is paused, or a budget that is used up: as often as it looks
    for seconds in (31, 62, 93):
        set_clock(worker, seconds)
        assert enqueue_refills(worker, limit=2, most_open=2) == (0, False)
    assert enqueue_refills(worker, limit=2, most_open=3) == (2, True)
    set_clock(worker, 700)
    assert promote(worker) == 2
    assert enqueue_refills(worker, limit=2, most_open=4) == (0, False)
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs") == 4


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
    # what came more than five minutes ago says nothing of the rate
    set_clock(worker, 400)
    assert (overview(NEW).chunks_per_second, overview(NEW).time_left) == (0, None)
    lease = claim(worker, limit=1, pool="background")[0]
    store(worker, lease, pending_refill(worker, lease.subject_id))
    set_clock(worker, 500)
    assert overview(NEW).chunks_per_second == pytest.approx(5 / 300)
    assert overview(NEW).time_left.total_seconds() == pytest.approx(600)
    old_one = overview(OLD)
    assert (old_one.filled_chunks, old_one.lacking_chunks, old_one.vectors) == (20, 0, 20)
    assert (old_one.chunks_per_second, old_one.time_left) == (None, None)
    worker.execute("select upload_pipeline.pause_model(%s, true)", [NEW])
    assert overview(NEW).time_left is None


def test_of_a_retired_model_only_what_is_to_be_removed_is_counted(
    admin: Connection, worker: Connection, old: None
) -> None:
    add_chunks(admin)
    add(worker)
    fill(worker)
    retire(worker, NEW)
    found = worker.execute(
        "select filled_chunks, lacking_chunks, lacking_documents, vectors from upload_pipeline.model_overview"
        " where model = %s",
        [NEW],
    ).fetchone()
    assert found is not None
    assert tuple(found) == (None, None, None, 3)
