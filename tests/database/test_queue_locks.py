"""The order in which verbs lock jobs and lanes, and that no two block each other in a ring."""

from __future__ import annotations

import contextlib
import random
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
    enqueue,
    fail,
    in_background,
    job_row,
    promote,
    reap,
    release,
    renew,
    retry,
    user_number,
    value,
)

TINY = """
insert into upload_pipeline.stages (pipeline, stage, position, progress, pool, final) values
  ('tiny', 'todo', 0, 0, 'default', false), ('tiny', 'half', 1, 50, 'default', false),
  ('tiny', 'late', 2, 70, 'other', false), ('tiny', 'finished', 3, 100, 'default', true)
"""


def lock_is_free(admin: Connection, job: UUID) -> bool:
    try:
        admin.execute("select from upload_pipeline.upload_jobs where job_id = %s for no key update nowait", [job])
    except psycopg.errors.LockNotAvailable:
        return False
    return True


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
