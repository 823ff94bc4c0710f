"""What two connections do to each other: every wait is seen in pg_stat_activity before its end is judged."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    add_document,
    add_job,
    advance,
    advance_many,
    advance_to,
    await_lock_wait,
    cancel,
    claim,
    claim_one,
    enqueue,
    event_codes,
    fail,
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
    user_number,
    value,
)

TINY = """
insert into upload_pipeline.stages (pipeline, stage, position, progress, pool, final) values
  ('tiny', 'todo', 0, 0, 'default', false), ('tiny', 'half', 1, 50, 'default', false),
  ('tiny', 'late', 2, 70, 'other', false), ('tiny', 'finished', 3, 100, 'default', true)
"""


@pytest.fixture
def other(connect: Connect) -> Connection:
    """A second worker, with the same clock as the first."""
    connection = connect()
    set_clock(connection)
    return connection


def lock_is_free(admin: Connection, job: UUID) -> bool:
    try:
        admin.execute("select from upload_pipeline.upload_jobs where job_id = %s for no key update nowait", [job])
    except psycopg.errors.LockNotAvailable:
        return False
    return True


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


# the order of locks


def ordered_jobs(admin: Connection, worker: Connection) -> tuple[Any, Any]:
    """Two leases, the lower job id first."""
    for _ in range(2):
        add_job(admin, worker)
    low, high = sorted(claim(worker, limit=2), key=lambda x: x.job_id.bytes)
    return low, high


@pytest.mark.parametrize("verb", ["renew", "advance", "release"])
def test_a_verb_of_several_jobs_locks_them_in_id_order(
    admin: Connection, worker: Connection, other: Connection, verb: str
) -> None:
    low, high = ordered_jobs(admin, worker)
    worker.execute("begin")
    renew(worker, [low])
    calls: dict[str, Callable[[], Any]] = {
        "renew": lambda: renew(other, [high, low]),
        "advance": lambda: advance_many(
            other, [(x.job_id, x.lease_token, "queued", "job_validated", True) for x in (high, low)]
        ),
        "release": lambda: release(other, [high, low]),
    }
    called = in_background(calls[verb])
    await_lock_wait(admin, other)
    assert lock_is_free(admin, high.job_id)
    worker.execute("commit")
    assert len(called.result(timeout=10)) == 2


def test_an_advance_locks_in_id_order_also_across_stages(
    admin: Connection, worker: Connection, other: Connection
) -> None:
    low, high = ordered_jobs(admin, worker)
    advance_to(worker, low, "parsed")
    worker.execute("begin")
    renew(worker, [low])
    called = in_background(
        advance_many,
        other,
        [
            (high.job_id, high.lease_token, "queued", "job_validated", True),
            (low.job_id, low.lease_token, "parsed", "parse_validated", True),
        ],
    )
    await_lock_wait(admin, other)
    assert lock_is_free(admin, high.job_id)
    worker.execute("commit")
    assert len(called.result(timeout=10)) == 2


def test_batches_with_the_same_documents_in_opposite_order_do_not_block_each_other_in_a_ring(
    admin: Connection, worker: Connection, other: Connection, connect: Connect
) -> None:
    users = uuid4(), uuid4()
    low, high = sorted((uuid4(), uuid4()), key=lambda x: x.bytes)
    for document, user in zip((low, high), users, strict=True):
        add_document(admin, user, document)
    worker.execute("begin")
    enqueue(worker, low, users[0])
    asked = in_background(
        lambda: other.execute(
            "select * from upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[])", [[high, low], [users[1], users[0]]]
        ).fetchall()
    )
    await_lock_wait(admin, other)
    third = connect()
    third.execute("set lock_timeout = '2 s'")
    enqueue(third, high, users[1])  # would time out if the waiting batch had written this row already
    worker.execute("commit")
    assert [row.created for row in asked.result(timeout=10)] == [False, False]


def test_lanes_are_readied_in_one_order_whatever_order_the_jobs_come_in(
    admin: Connection, worker: Connection, other: Connection
) -> None:
    users = [user_number(1), user_number(2)]
    leases = []
    for user in users:
        add_job(admin, worker, user)
    leases = claim(worker, limit=2)
    worker.execute("begin")
    enqueue(worker, add_document(admin, users[0]), users[0])  # holds the first user's lane
    released = in_background(release, other, [leases[1], leases[0]])
    await_lock_wait(admin, other)
    admin.execute("select from upload_pipeline.lanes where user_id = %s for no key update nowait", [users[1]])
    worker.execute("commit")
    assert len(released.result(timeout=10)) == 2


def test_nothing_deadlocks_and_nothing_is_stranded_under_every_verb_at_once(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    """Ten connections call every verb on the same few jobs in random order for a few seconds."""
    admin.execute(TINY)
    users = [user_number(i) for i in range(1, 7)]
    pairs = [(add_document(admin, user), user) for user in users for _ in range(5)]
    path = ("todo", "half", "late", "finished")
    stop = time.monotonic() + 4
    errors: list[psycopg.Error] = []
    calls = 0

    def work(db: Connection, seed: int) -> int:
        draw = random.Random(seed)
        db.execute("set upload_pipeline.backoff_base = '1 millisecond'")
        held: list[Any] = []
        made = 0
        while time.monotonic() < stop:
            made += 1
            known = [row.job_id for row in db.execute("select job_id from upload_pipeline.upload_jobs").fetchall()]
            draw.shuffle(held)
            group = held[: draw.randint(0, len(held))]
            try:
                match draw.randrange(11):
                    case 0 | 1:
                        batch = draw.sample(pairs, draw.randint(1, 12))
                        db.execute(
                            "select upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[], 'tiny')",
                            [[document for document, _ in batch], [user for _, user in batch]],
                        )
                    case 2 | 3 | 4:
                        pool = draw.choice(("default", "other"))
                        held += claim(db, limit=5, after=draw.choice([None, *users]), pool=pool, ttl="30 ms")
                    case 5 | 6:
                        rows = [job_row(db, x.job_id) for x in group]
                        moves = [
                            (x.job_id, x.lease_token, row.stage, path[path.index(row.stage) + 1], draw.random() < 0.5)
                            for x, row in zip(group, rows, strict=True)
                            if row.stage != "finished"
                        ]
                        advance_many(db, moves, ttl="30 ms")
                    case 7:
                        renew(db, group, ttl="30 ms")
                        if group and draw.random() < 0.5:
                            fail(db, group[0])
                    case 8:
                        release(db, group)
                        held = [x for x in held if x not in group]
                    case 9:
                        reap(db)
                        promote(db)
                    case _ if known:
                        job = draw.choice(known)
                        cancel(db, job) if draw.random() < 0.3 else retry(db, job, force=True)
            except psycopg.Error as error:
                # what a stale lease, a stage read before another moved the job, and an ended job are answered with
                if error.sqlstate not in ("UP001", "UP003", "UP004"):
                    errors.append(error)
                    raise
            held = held[-20:]
        return made

    before = value(admin, "select deadlocks from pg_stat_database where datname = current_database()")
    running = [in_background(work, connect(), seed) for seed in range(10)]
    for future in running:
        with contextlib.suppress(psycopg.Error):
            calls += future.result(timeout=30)
    assert errors == []
    assert calls > 500
    admin.execute("select pg_stat_force_next_flush()")
    assert value(admin, "select deadlocks from pg_stat_database where datname = current_database()") == before
    assert_trail_is_whole(admin)
    # what is left ends: nothing is stranded in a lane that nobody looks at
    worker.execute("set upload_pipeline.backoff_base = '1 millisecond'")
    deadline = time.monotonic() + 20
    while value(admin, "select count(*) from upload_pipeline.upload_jobs where finished_at is null"):
        assert time.monotonic() < deadline, "jobs are left that no claim finds"
        reap(worker)
        promote(worker)
        for pool in ("default", "other"):
            for x in claim(worker, limit=10, pool=pool):
                advance(worker, x, x.stage, path[path.index(x.stage) + 1], keep=False)
        time.sleep(0.01)


def assert_trail_is_whole(admin: Connection) -> None:
    """Each job's events name tokens that never fall, and one claim for each token that a claim raised."""
    falls = value(
        admin,
        """
        select count(*) from (
          select lease_token, lag(lease_token) over (partition by job_id order by event_id) as earlier
            from upload_pipeline.events where lease_token is not null) s where lease_token < earlier
        """,
    )
    assert falls == 0
    wrong = value(
        admin,
        """
        select count(*) from upload_pipeline.upload_jobs j
         where j.lease_token <> (select count(*) from upload_pipeline.events e
                                  where e.job_id = j.job_id and e.code in ('job_claimed', 'job_restarted'))
        """,
    )
    assert wrong == 0


# waking


def notifications(db: Connection) -> list[str]:
    return [note.payload for note in db.notifies(timeout=0.15)]


def test_a_lane_that_turns_ready_wakes_its_pool_once(admin: Connection, worker: Connection, other: Connection) -> None:
    other.execute("listen upload_pipeline_jobs")
    user = uuid4()
    for _ in range(20):
        add_job(admin, worker, user)
    assert notifications(other) == ["default"]
    held = claim(worker, limit=2)
    release(worker, held)
    assert notifications(other) == []  # the lane stayed ready all the time


def test_a_lane_that_was_parked_wakes_its_pool_again(worker: Connection, other: Connection, lease: Any) -> None:
    other.execute("listen upload_pipeline_jobs")
    release(worker, [lease])
    assert notifications(other) == ["default"]


def test_a_batch_of_many_users_wakes_the_pool_once(admin: Connection, worker: Connection, other: Connection) -> None:
    other.execute("listen upload_pipeline_jobs")
    users = [uuid4() for _ in range(50)]
    documents = [add_document(admin, user) for user in users]
    worker.execute("select upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[])", [documents, users])
    assert notifications(other) == ["default"]


def test_a_job_handed_on_wakes_the_pool_that_it_goes_to(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    admin.execute("update upload_pipeline.stages set pool = 'parse' where stage = 'parsing'")
    other.execute("listen upload_pipeline_jobs")
    advance(worker, lease, "queued", "job_validated")
    advance(worker, lease, "job_validated", "parsing")
    assert notifications(other) == ["parse"]


def test_a_wake_up_of_a_transaction_that_is_rolled_back_is_not_sent(
    admin: Connection, worker: Connection, other: Connection
) -> None:
    other.execute("listen upload_pipeline_jobs")
    user = uuid4()
    document = add_document(admin, user)
    worker.execute("begin")
    enqueue(worker, document, user)
    worker.execute("rollback")
    assert notifications(other) == []
