"""What two connections do to each other: every wait is seen in pg_stat_activity before its end is judged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    add_document,
    add_job,
    advance,
    advance_to,
    await_lock_wait,
    cancel,
    claim_one,
    enqueue,
    event_codes,
    in_background,
    job_row,
    lane_ready,
    promote,
    reap,
    release,
    renew,
    retry,
    set_clock,
    snooze,
)

# reap, against who still holds the lease


def test_a_reap_leaves_alone_a_lease_whose_renewal_is_not_committed(
    worker: Connection, other: Connection, lease: Any
) -> None:
    for db in (worker, other):
        set_clock(db, 61)
    with worker.transaction():
        assert renew(worker, [lease]) == {lease.job_id: False}
        assert reap(other) == 0
    assert reap(other) == 0
    assert job_row(worker, lease.job_id).state == "working"


def test_a_renewal_that_comes_while_the_reap_is_under_way_waits_and_is_told_that_the_lease_is_lost(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    set_clock(other, 61)
    other.execute("begin")
    assert reap(other) == 1
    renewed = in_background(renew, worker, [lease])
    await_lock_wait(admin, worker)
    other.execute("commit")
    assert renewed.result(timeout=10) == {}
    assert job_row(worker, lease.job_id).state == "retryable"


def test_a_renewal_and_a_reap_at_the_same_moment_agree_on_who_won(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    for turn in range(60):
        admin.execute("update upload_pipeline.upload_jobs set lease_expires_at = '2000-01-01'")
        barrier = threading.Barrier(2)

        def meet(call: Callable[..., Any], *arguments: Any, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait()
            return call(*arguments)

        reaping = in_background(meet, reap, other)
        renewed = meet(renew, worker, [lease])
        reaped = reaping.result(timeout=10)
        row = job_row(worker, lease.job_id)
        assert (bool(renewed), reaped, row.state) in [(True, 0, "working"), (False, 1, "retryable")], turn
        if reaped:
            retry(worker, lease.job_id, force=True)
            lease = claim_one(worker)


def test_a_finish_that_meets_a_reap_waits_for_it_and_loses(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    advance_to(worker, lease, "embeddings_buffered")
    set_clock(other, 61)
    other.execute("begin")
    assert reap(other) == 1
    finished = in_background(advance, worker, lease, "embeddings_buffered", "embedded")
    await_lock_wait(admin, worker)
    other.execute("commit")
    with pytest.raises(psycopg.Error) as error:
        finished.result(timeout=10)
    assert error.value.sqlstate == "UP001"
    assert job_row(worker, lease.job_id).state == "retryable"
    assert "job_done" not in event_codes(worker, lease.job_id)


def test_a_reap_that_meets_a_finish_passes_over_the_job(worker: Connection, other: Connection, lease: Any) -> None:
    advance_to(worker, lease, "embeddings_buffered")
    set_clock(other, 61)
    with worker.transaction():
        advance(worker, lease, "embeddings_buffered", "embedded")
        assert reap(other) == 0
    assert reap(other) == 0
    assert job_row(worker, lease.job_id).state == "done"


def test_two_reaps_at_once_count_each_job_once(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    add_job(admin, worker)
    claim_one(worker)
    for db in (worker, other):
        set_clock(db, 61)
    with worker.transaction():
        assert reap(worker, limit=1) == 1
        assert reap(other) == 1
    assert reap(other) == 0


def test_two_promotions_at_once_ready_each_job_once(worker: Connection, other: Connection, lease: Any) -> None:
    snooze(worker, lease, "1 second")
    for db in (worker, other):
        set_clock(db, 2)
    with worker.transaction():
        assert promote(worker) == 1
        assert promote(other) == 0
    assert promote(other) == 0


# a restart or a cancel, against who is at work


def test_a_restart_waits_for_the_results_being_written_and_fences_what_comes_after(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    worker.execute("begin")
    worker.execute("select upload_pipeline.check_lease(%s, %s)", [lease.job_id, lease.lease_token])
    restarted = in_background(retry, other, lease.job_id, None, True)
    await_lock_wait(admin, other)
    advance(worker, lease, "queued", "job_validated")
    worker.execute("commit")
    assert restarted.result(timeout=10).stage == "job_validated"
    with pytest.raises(psycopg.Error) as error:
        advance(worker, lease, "job_validated", "parsing")
    assert error.value.sqlstate == "UP001"


def test_results_that_meet_a_restart_wait_for_it_and_are_refused(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    other.execute("begin")
    retry(other, lease.job_id, force=True)
    checked = in_background(
        worker.execute, "select upload_pipeline.check_lease(%s, %s)", [lease.job_id, lease.lease_token]
    )
    await_lock_wait(admin, worker)
    other.execute("commit")
    with pytest.raises(psycopg.Error) as error:
        checked.result(timeout=10)
    assert error.value.sqlstate == "UP001"


def test_a_restart_that_meets_another_job_of_its_document_is_refused(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    cancel(worker, lease.job_id)
    release(worker, [lease])
    worker.execute("begin")
    enqueue(worker, lease.document_id, lease.user_id)
    restarted = in_background(retry, other, lease.job_id)
    await_lock_wait(admin, other)
    worker.execute("commit")
    with pytest.raises(psycopg.Error) as error:
        restarted.result(timeout=10)
    assert error.value.sqlstate == "UP003"
    assert job_row(worker, lease.job_id).state == "cancelled"


def test_a_cancel_that_meets_the_last_step_finds_the_job_done(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    advance_to(worker, lease, "embeddings_buffered")
    worker.execute("begin")
    advance(worker, lease, "embeddings_buffered", "embedded")
    cancelled = in_background(cancel, other, lease.job_id)
    await_lock_wait(admin, other)
    worker.execute("commit")
    assert cancelled.result(timeout=10).state == "done"
    assert event_codes(worker, lease.job_id)[-1] == "job_done"


# enqueue, against itself


def test_two_enqueues_of_one_document_make_one_job(admin: Connection, worker: Connection, other: Connection) -> None:
    user = uuid4()
    document = add_document(admin, user)
    worker.execute("begin")
    first = enqueue(worker, document, user)
    second = in_background(enqueue, other, document, user)
    await_lock_wait(admin, other)
    worker.execute("commit")
    assert second.result(timeout=10) == first


def test_an_enqueue_whose_rival_rolls_back_makes_the_job(
    admin: Connection, worker: Connection, other: Connection
) -> None:
    user = uuid4()
    document = add_document(admin, user)
    worker.execute("begin")
    enqueue(worker, document, user)
    second = in_background(enqueue, other, document, user)
    await_lock_wait(admin, other)
    worker.execute("rollback")
    assert job_row(worker, second.result(timeout=10)).state == "queued"
    assert lane_ready(worker, user)


def test_an_enqueue_whose_live_job_ends_meanwhile_still_names_it(
    admin: Connection, worker: Connection, other: Connection, connect: Connect
) -> None:
    users = uuid4(), uuid4()
    documents = [add_document(admin, user) for user in users]
    live = enqueue(worker, documents[0], users[0])
    blocker = connect()
    blocker.execute("begin")
    enqueue(blocker, add_document(admin, users[1]), users[1])  # holds the second user's lane
    asked = in_background(
        lambda: other.execute(
            "select * from upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[])", [documents, list(users)]
        ).fetchall()
    )
    await_lock_wait(admin, other)
    cancel(worker, live)
    blocker.execute("commit")
    rows = asked.result(timeout=10)
    assert [row.document_id for row in rows] == documents
    assert (rows[0].job_id, rows[0].created, rows[1].created) == (live, False, True)
