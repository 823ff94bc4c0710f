"""What operators do to jobs and lanes in each state, and the register of workers."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connection
from verbs import (
    STAGES,
    add_document,
    add_job,
    advance_to,
    cancel,
    claim,
    claim_one,
    enqueue,
    event_codes,
    fail,
    job_row,
    lane_ready,
    reap,
    release,
    renew,
    retry,
    set_clock,
    snooze,
    sqlstate,
    value,
)


def bring(worker: Connection, lease: Any, state: str, stage: str) -> None:
    """Brings a claimed job to a state at a stage."""
    if state == "done":
        advance_to(worker, lease, "embedded")
        return
    advance_to(worker, lease, stage)
    match state:
        case "queued":
            release(worker, [lease])
        case "retryable":
            snooze(worker, lease)
        case "deadletter":
            fail(worker, lease, retryable=False)
        case "cancelled":
            cancel(worker, lease.job_id)
            release(worker, [lease])


LIVE = ("queued", "working", "retryable")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("target", [None, "queued", "parsed", "embedding", "embedded", "nowhere"])
@pytest.mark.parametrize("state", ["queued", "working", "retryable", "done", "deadletter", "cancelled"])
def test_a_restart_in_each_state_at_each_kind_of_stage(
    worker: Connection, lease: Any, state: str, target: str | None, force: bool
) -> None:
    bring(worker, lease, state, "parsed")
    before = job_row(worker, lease.job_id)
    reached = STAGES.index(before.stage)
    if not force and (state in LIVE or (state == "done" and target is None)):
        expected = "UP003"
    elif (target or before.stage) in ("embedded", "nowhere") or STAGES.index(target or before.stage) > reached:
        expected = "UP004"
    else:
        expected = None
    if expected:
        with pytest.raises(psycopg.Error) as error:
            retry(worker, lease.job_id, target, force)
        assert sqlstate(error) == expected
        assert job_row(worker, lease.job_id) == before
        return
    retry(worker, lease.job_id, target, force)
    row = job_row(worker, lease.job_id)
    assert (row.state, row.stage, row.retry_count, row.cancel_requested) == ("queued", target or before.stage, 0, False)
    assert (row.lease_token, row.finished_at, row.worker_id) == (before.lease_token + 1, None, None)
    assert event_codes(worker, lease.job_id)[-1] == "job_restarted"
    assert value(worker, "select count(*) from upload_pipeline.job_outcomes") == 0
    assert renew(worker, [lease]) == {}
    assert claim_one(worker).stage == row.stage


def test_a_restart_of_an_unknown_job_says_so(worker: Connection) -> None:
    for call in (retry, cancel):
        with pytest.raises(psycopg.Error, match="there is no job") as error:
            call(worker, uuid4())
        assert sqlstate(error) == "UP002"


def test_a_restart_beside_another_live_job_of_the_document_is_refused(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    document = add_document(admin, user)
    first = enqueue(worker, document, user)
    cancel(worker, first)
    enqueue(worker, document, user)
    with pytest.raises(psycopg.Error, match="under way") as error:
        retry(worker, first)
    assert sqlstate(error) == "UP003"


def test_a_job_of_a_document_that_is_being_deleted_does_not_start_again(worker: Connection, lease: Any) -> None:
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id])
    with pytest.raises(psycopg.Error, match="being deleted") as error:
        retry(worker, lease.job_id)
    assert sqlstate(error) == "UP003"
    assert job_row(worker, lease.job_id).state == "cancelled"


def test_a_restart_takes_the_stages_pool_of_now(admin: Connection, worker: Connection, lease: Any) -> None:
    bring(worker, lease, "deadletter", "parsing")
    admin.execute("update upload_pipeline.stages set pool = 'parse' where stage = 'parsing'")
    retry(worker, lease.job_id)
    assert claim_one(worker, pool="parse").job_id == lease.job_id


@pytest.mark.parametrize("state", ["queued", "working", "retryable", "done", "deadletter", "cancelled"])
def test_a_cancel_in_each_state(worker: Connection, lease: Any, state: str) -> None:
    bring(worker, lease, state, "parsed")
    before = job_row(worker, lease.job_id)
    answer = cancel(worker, lease.job_id)
    row = job_row(worker, lease.job_id)
    assert answer.state == row.state
    if state in ("queued", "retryable"):
        assert row.state == "cancelled"
        assert row.finished_at is not None
    elif state == "working":
        assert (row.state, row.cancel_requested, row.worker_id) == ("working", True, before.worker_id)
    else:
        assert row == before
    again = job_row(worker, lease.job_id), event_codes(worker, lease.job_id)
    assert cancel(worker, lease.job_id) == answer
    assert (job_row(worker, lease.job_id), event_codes(worker, lease.job_id)) == again


def test_a_cancelled_job_is_not_claimed_and_its_lane_parks(worker: Connection, lease: Any) -> None:
    release(worker, [lease])
    cancel(worker, lease.job_id)
    assert claim(worker) == []
    assert not lane_ready(worker, job_row(worker, lease.job_id).user_id)


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_below_one_is_refused(worker: Connection, cap: int) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        worker.execute("select upload_pipeline.set_lane_cap(%s, 'default', %s::integer)", [uuid4(), cap])


def test_a_cap_set_before_the_first_job_holds(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    for _ in range(2):
        worker.execute("select upload_pipeline.set_lane_cap(%s, 'default', 1)", [user])
    assert not lane_ready(worker, user)
    add_job(admin, worker, user)
    add_job(admin, worker, user)
    assert len(claim(worker, limit=5)) == 1


def test_a_worker_comes_into_the_register_and_leaves_it(worker: Connection) -> None:
    set_clock(worker)
    silent, busy = uuid4(), uuid4()
    for one in (silent, busy, silent):
        worker.execute("select upload_pipeline.register_worker(%s, 'host', 7, 'v1', '{default}', 4)", [one])
    assert value(worker, "select count(*) from upload_pipeline.workers") == 2
    set_clock(worker, 300)
    renew(worker, [], worker=busy)
    set_clock(worker, 601)
    assert value(worker, "select upload_pipeline.forget_lost_workers('10 minutes')") == 1
    worker.execute("select upload_pipeline.unregister_worker(%s)", [busy])
    worker.execute("select upload_pipeline.unregister_worker(%s)", [busy])
    assert value(worker, "select count(*) from upload_pipeline.workers") == 0


def test_a_worker_that_leaves_pools_is_an_event_and_an_error_where_nobody_serves_one(worker: Connection) -> None:
    set_clock(worker)
    first, second, silent = uuid4(), uuid4(), uuid4()

    def leave(one: UUID, *pools: str) -> None:
        worker.execute("select upload_pipeline.leave_pools(%s, %s)", [one, list(pools)])

    worker.execute("select upload_pipeline.register_worker(%s, 'h', 1, 'v', '{default}', 4)", [silent])
    set_clock(worker, 121)
    for one in (first, second):
        worker.execute("select upload_pipeline.register_worker(%s, 'h', 1, 'v', '{background,default}', 4)", [one])
    leave(first, "default")
    leave(first, "default")
    leave(second, "background", "default")
    leave(first)
    leave(uuid4(), "default")
    told = worker.execute(
        "select severity::text, payload from upload_pipeline.events where code = 'worker_left_pools' order by event_id"
    ).fetchall()
    assert [(row.severity, row.payload["left_pools"], row.payload["served_by_nobody"]) for row in told] == [
        ("warning", ["default"], []),
        ("error", ["background", "default"], ["default"]),
        ("info", [], []),
    ]


def test_a_silent_worker_that_still_holds_a_lease_is_not_forgotten(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    me = uuid4()
    worker.execute("select upload_pipeline.register_worker(%s, 'host', 7, 'v1', '{default}', 4)", [me])
    add_job(admin, worker)
    claim_one(worker, worker=me)
    set_clock(worker, 601)
    assert value(worker, "select upload_pipeline.forget_lost_workers('10 minutes')") == 0
    reap(worker)
    assert value(worker, "select upload_pipeline.forget_lost_workers('10 minutes')") == 1
