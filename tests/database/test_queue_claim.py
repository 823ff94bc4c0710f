from __future__ import annotations

import threading
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    add_document,
    add_job,
    advance_many,
    await_lock_wait,
    cancel,
    claim,
    claim_one,
    enqueue,
    event_codes,
    in_background,
    job_row,
    job_rows,
    lane_ready,
    release,
    set_clock,
    terminate,
    user_number,
    value,
)

NIL = UUID(int=0)


def test_a_claim_leases_the_job_and_says_so(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    job, me = add_job(admin, worker), uuid4()
    lease = claim_one(worker, worker=me, ttl="60 seconds")
    row = job_row(worker, job)
    assert (lease.job_id, lease.stage, lease.retry_count, lease.lease_token) == (job, "queued", 0, 1)
    assert (row.state, row.worker_id, row.lease_token, row.lease_expires_at) == (
        "working",
        me,
        1,
        lease.lease_expires_at,
    )
    assert (lease.lease_expires_at - row.started_at).total_seconds() == 60
    assert event_codes(worker, job) == ["job_enqueued", "job_claimed"]


def test_a_second_claim_finds_nothing(admin: Connection, worker: Connection) -> None:
    add_job(admin, worker)
    assert len(claim(worker)) == 1
    assert claim(worker) == []


def test_the_first_start_is_kept_by_later_claims(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    job = add_job(admin, worker)
    release(worker, claim(worker))
    first = job_row(worker, job).started_at
    set_clock(worker, 100)
    assert claim_one(worker).lease_token == 2
    assert job_row(worker, job).started_at == first


def test_a_claim_that_is_rolled_back_leaves_the_job_ready(admin: Connection, worker: Connection) -> None:
    add_job(admin, worker)
    before = job_rows(worker)
    with pytest.raises(RuntimeError, match="crash"), worker.transaction():  # noqa: PT012
        assert len(claim(worker)) == 1
        raise RuntimeError("crash")
    assert job_rows(worker) == before
    assert len(claim(worker)) == 1


def test_a_claimant_whose_connection_is_cut_leaves_job_and_lane_ready(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    user = uuid4()
    add_job(admin, worker, user)
    victim = connect()
    victim.execute("begin")
    assert len(claim(victim)) == 1
    terminate(admin, victim)
    assert lane_ready(worker, user)
    assert claim_one(worker).lease_token == 1


@pytest.mark.parametrize("limit", [0, -1, None])
def test_a_limit_below_one_is_refused(admin: Connection, worker: Connection, limit: int | None) -> None:
    add_job(admin, worker)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_limit"):
        claim(worker, limit=limit)  # type: ignore[arg-type]


def test_a_claim_without_a_worker_is_refused(admin: Connection, worker: Connection) -> None:
    add_job(admin, worker)
    with pytest.raises(psycopg.errors.CheckViolation):
        worker.execute("select * from upload_pipeline.claim_jobs(null, 'default', 1)")
    assert len(claim(worker)) == 1


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_transaction_with_one_snapshot_for_all_is_refused(admin: Connection, worker: Connection, level: str) -> None:
    add_job(admin, worker)
    worker.execute(f"begin isolation level {level}")
    with pytest.raises(psycopg.errors.ActiveSqlTransaction, match="READ COMMITTED"):
        claim(worker)
    worker.execute("rollback")


def test_pools_do_not_see_each_other(admin: Connection, worker: Connection) -> None:
    add_job(admin, worker)
    assert claim(worker, pool="parse") == []
    assert len(claim(worker)) == 1


def test_within_a_user_priority_goes_first_and_then_age(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    jobs = [add_job(admin, worker, user, priority) for priority in (0, 5, 5, -3, 0)]
    admin.execute("update upload_pipeline.lanes set max_in_flight = 10")
    leases = [lease.job_id for lease in claim(worker, limit=10)]
    assert leases == [jobs[i] for i in (1, 2, 0, 4, 3)]


def test_a_batch_keeps_the_order_in_which_it_was_asked_for(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    documents = [add_document(admin, user) for _ in range(30)]
    rows = worker.execute(
        "select * from upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[])", [documents, [user] * 30]
    ).fetchall()
    assert [row.document_id for row in rows] == documents
    admin.execute("update upload_pipeline.lanes set max_in_flight = 30")
    assert [lease.document_id for lease in claim(worker, limit=30)] == documents


def test_each_user_gives_one_job_while_there_are_users_enough(admin: Connection, worker: Connection) -> None:
    users = [user_number(i) for i in range(1, 6)]
    for user in users:
        for _ in range(3):
            add_job(admin, worker, user)
    assert [lease.user_id for lease in claim(worker, limit=3)] == users[:3]
    assert [lease.user_id for lease in claim(worker, limit=3, after=users[2])] == [users[3], users[4], users[0]]


def test_fewer_users_than_asked_share_it_evenly(admin: Connection, worker: Connection) -> None:
    users = [user_number(i) for i in range(1, 4)]
    for user in users:
        for _ in range(9):
            add_job(admin, worker, user)
    admin.execute("update upload_pipeline.lanes set max_in_flight = 9")
    taken = [lease.user_id for lease in claim(worker, limit=8)]
    assert taken == [users[0]] * 3 + [users[1]] * 3 + [users[2]] * 2


def test_the_walk_visits_every_user_once_a_turn(admin: Connection, worker: Connection) -> None:
    users = [user_number(i) for i in range(1, 12)]
    for user in users:
        for _ in range(2):
            add_job(admin, worker, user)
    cursor, seen = None, []
    for _ in range(4):
        leases = claim(worker, limit=3, after=cursor)
        cursor = leases[-1].user_id
        seen += [lease.user_id for lease in leases]
    assert seen == [*users, users[0]]


def test_a_cursor_behind_the_last_user_starts_again(admin: Connection, worker: Connection) -> None:
    add_job(admin, worker, user_number(1))
    assert len(claim(worker, after=user_number(99))) == 1


def test_a_full_lane_gives_nothing_until_a_job_ends(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    for _ in range(3):
        add_job(admin, worker, user)
    held = claim(worker, limit=10)
    assert len(held) == 2
    assert claim(worker, limit=10) == []
    release(worker, held[:1])
    assert len(claim(worker, limit=10)) == 1


def test_a_cap_lowered_while_jobs_run_lets_them_run_and_starts_no_more(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    for _ in range(6):
        add_job(admin, worker, user)
    admin.execute("update upload_pipeline.lanes set max_in_flight = 4")
    held = claim(worker, limit=10)
    assert len(held) == 4
    worker.execute("select upload_pipeline.set_lane_cap(%s, 'default', 2)", [user])
    assert claim(worker, limit=10) == []
    release(worker, held[:2])
    assert claim(worker, limit=10) == []
    release(worker, held[2:3])
    assert len(claim(worker, limit=10)) == 1


def test_a_lane_parks_when_its_last_job_is_claimed_and_opens_when_one_comes_back(
    admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    add_job(admin, worker, user)
    held = claim(worker)
    assert not lane_ready(worker, user)
    release(worker, held)
    assert lane_ready(worker, user)


def test_lanes_whose_jobs_were_cancelled_do_not_hide_the_job_behind_them(admin: Connection, worker: Connection) -> None:
    for number in range(1, 6):
        cancel(worker, add_job(admin, worker, user_number(number)))
        assert lane_ready(worker, user_number(number)), "nobody looks at a lane for a cancellation"
    job = add_job(admin, worker, user_number(9))
    assert claim_one(worker).job_id == job
    assert [lane_ready(worker, user_number(number)) for number in (1, 2, 3, 4, 5, 9)] == [False] * 6


def test_a_claim_looks_behind_a_bounded_number_of_empty_lanes_and_the_next_goes_on(
    admin: Connection, worker: Connection
) -> None:
    for number in range(1, 26):
        cancel(worker, add_job(admin, worker, user_number(number)))
    job = add_job(admin, worker, user_number(99))
    assert claim(worker) == []
    assert claim_one(worker).job_id == job


def test_jobs_locked_by_another_are_passed_over(admin: Connection, worker: Connection, connect: Connect) -> None:
    user = uuid4()
    first, second = add_job(admin, worker, user), add_job(admin, worker, user)
    other = connect()
    with other.transaction():
        other.execute("select * from upload_pipeline.cancel_job(%s)", [first])
        assert [lease.job_id for lease in claim(worker)] == [second]


def test_a_lane_locked_by_another_claim_is_passed_over(admin: Connection, worker: Connection, connect: Connect) -> None:
    users = [user_number(1), user_number(2)]
    for user in users:
        add_job(admin, worker, user)
        add_job(admin, worker, user)
    other = connect()
    with other.transaction():
        assert claim_one(other).user_id == users[0]
        assert [lease.user_id for lease in claim(worker, limit=5)] == [users[1]] * 2


def test_the_cap_is_exact_under_sixteen_claimants(admin: Connection, worker: Connection, connect: Connect) -> None:
    """Samples what is at work while sixteen connections claim and hand on as fast as they can."""
    users = [user_number(i) for i in range(1, 4)]
    admin.execute(
        """
        insert into upload_pipeline.stages (pipeline, stage, position, progress, final)
        values ('tiny', 'todo', 0, 0, false), ('tiny', 'finished', 1, 100, true)
        """
    )
    for user in users:
        documents = [add_document(admin, user) for _ in range(120)]
        worker.execute(
            "select upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[], 'tiny')", [documents, [user] * len(documents)]
        )
    stop = threading.Event()

    def work(db: Connection) -> int:
        ended, cursor = 0, None
        while not stop.is_set():
            leases = claim(db, limit=4, after=cursor)
            if leases:
                cursor = leases[-1].user_id
                moves = [(x.job_id, x.lease_token, "todo", "finished", True) for x in leases]
                ended += len(advance_many(db, moves))
            elif not value(db, "select count(*) from upload_pipeline.upload_jobs where state <> 'done'"):
                break
        return ended

    running = [in_background(work, connect()) for _ in range(16)]
    most, samples = 0, 0
    try:
        while not all(future.done() for future in running):
            rows = admin.execute(
                "select count(*) from upload_pipeline.upload_jobs where state = 'working' group by user_id"
            ).fetchall()
            most = max([most, *(row[0] for row in rows)])
            samples += 1
            assert samples < 100_000
    finally:
        stop.set()
    assert sum(future.result(timeout=10) for future in running) == 360
    assert most == 2
    assert value(admin, "select count(*) from upload_pipeline.events where code = 'job_claimed'") == 360
    assert value(admin, "select count(*) from upload_pipeline.events where code = 'job_done'") == 360


@pytest.mark.parametrize("order", ["enqueue_locks_first", "claim_locks_first"])
def test_a_job_enqueued_while_a_claim_parks_the_lane_is_never_stranded(
    admin: Connection, worker: Connection, connect: Connect, order: str
) -> None:
    user = uuid4()
    add_job(admin, worker, user)
    document = add_document(admin, user)
    other = connect()
    if order == "enqueue_locks_first":
        with other.transaction():
            enqueue(other, document, user)
            assert claim(worker) == []  # the lane is locked: passed over, neither emptied nor parked
        assert lane_ready(worker, user)
    else:
        worker.execute("begin")
        assert len(claim(worker)) == 1  # took the only job it could see and parked the lane
        enqueued = in_background(enqueue, other, document, user)
        await_lock_wait(admin, other)
        worker.execute("commit")
        enqueued.result(timeout=10)
        assert lane_ready(worker, user)
    assert len(claim(worker, limit=5)) >= 1
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs where state = 'queued'") == 0


def test_the_nil_user_is_refused(admin: Connection, worker: Connection) -> None:
    document = add_document(admin, NIL)
    with pytest.raises(psycopg.errors.CheckViolation, match="lanes_user"):
        enqueue(worker, document, NIL)
