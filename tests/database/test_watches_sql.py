"""Who watches a job is notified of its news, and nobody else causes a notification."""

from __future__ import annotations

import time
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import add_job, cancel, set_clock, value

CHANNEL = "upload_pipeline_events"


@pytest.fixture
def listener(connect: Connect) -> Connection:
    """A connection that listens."""
    connection = connect()
    connection.execute(f"listen {CHANNEL}")
    return connection


def watch(db: Connection, *jobs: UUID, watcher: UUID | None = None, ttl: str = "60 seconds") -> UUID:
    """The watcher."""
    watcher = watcher or uuid4()
    db.execute("select upload_pipeline.watch_jobs(%s, %s::uuid[], %s::interval)", [watcher, list(jobs), ttl])
    return watcher


def unwatch(db: Connection, watcher: UUID, *jobs: UUID) -> None:
    db.execute("select upload_pipeline.unwatch_jobs(%s, %s::uuid[])", [watcher, list(jobs) or None])


def payloads(listener: Connection) -> list[str]:
    """What has been notified since the last time."""
    # What this connection notifies arrives behind all that was committed before.
    listener.execute("select pg_notify(%s, 'end')", [CHANNEL])
    heard: list[str] = []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for notification in listener.notifies(timeout=0.2, stop_after=1):
            if notification.payload == "end":
                return heard
            heard.append(notification.payload)
    raise AssertionError("the last notification did not arrive")


def write_events(admin: Connection, *jobs: UUID | None, at: str = "now()") -> None:
    admin.execute(
        f"""
        insert into upload_pipeline.events (at, code, job_id)
        select {at}, 'job_advanced', j from unnest(%s::uuid[]) j
        """,
        [list(jobs)],
    )


def test_only_what_is_watched_is_notified(admin: Connection, worker: Connection, listener: Connection) -> None:
    watched, other = add_job(admin, worker), add_job(admin, worker)
    cancel(worker, add_job(admin, worker))
    assert payloads(listener) == []
    watch(worker, watched)
    cancel(worker, other)
    assert payloads(listener) == []
    cancel(worker, watched)
    assert payloads(listener) == [str(watched)]


def test_an_event_without_a_job_is_nobodys_news(admin: Connection, worker: Connection, listener: Connection) -> None:
    watch(worker, uuid4())
    write_events(admin, None)
    assert payloads(listener) == []


def test_what_is_rolled_back_is_not_notified(admin: Connection, worker: Connection, listener: Connection) -> None:
    job = add_job(admin, worker)
    watch(worker, job)
    with worker.transaction(force_rollback=True):
        cancel(worker, job)
    assert payloads(listener) == []


def test_many_jobs_of_one_statement_are_named_once_each_in_notifications_that_fit(
    admin: Connection, worker: Connection, listener: Connection
) -> None:
    jobs = [uuid4() for _ in range(450)]
    watch(worker, *jobs)
    watch(worker, *jobs)
    write_events(admin, *jobs, *jobs, *(uuid4() for _ in range(450)))
    heard = payloads(listener)
    assert all(len(payload) < 8000 for payload in heard)
    assert sorted(",".join(heard).split(",")) == sorted(str(job) for job in jobs)


@pytest.mark.parametrize("at", ["now()", "now() + interval '1 month'", "'1999-01-01'", "'2099-06-01'"])
def test_an_event_of_any_month_is_notified(
    admin: Connection, worker: Connection, listener: Connection, at: str
) -> None:
    job = uuid4()
    watch(worker, job)
    if at == "'2099-06-01'":
        with admin.transaction():
            admin.execute("set local upload_pipeline.now = '2099-06-15'")
            admin.execute("select upload_pipeline.ensure_event_partitions(0)")
    write_events(admin, job, at=at)
    assert payloads(listener) == [str(job)]
    # moving it into a month of its own is no news
    with admin.transaction():
        admin.execute("set local upload_pipeline.now = '1999-01-15'")
        admin.execute("select upload_pipeline.ensure_event_partitions(0)")
    assert payloads(listener) == []


def test_a_watch_ends_when_it_is_dropped_and_another_watchers_stays(
    admin: Connection, worker: Connection, listener: Connection
) -> None:
    jobs = [uuid4() for _ in range(3)]
    one, two = watch(worker, *jobs), watch(worker, jobs[0])
    unwatch(worker, one, jobs[0], jobs[1], uuid4())
    write_events(admin, *jobs)
    assert sorted(",".join(payloads(listener)).split(",")) == sorted(map(str, (jobs[0], jobs[2])))
    unwatch(worker, one)
    unwatch(worker, two)
    unwatch(worker, two)
    write_events(admin, *jobs)
    assert payloads(listener) == []


def test_a_watch_runs_out_unless_it_is_renewed_and_is_then_removed(
    admin: Connection, worker: Connection, listener: Connection
) -> None:
    set_clock(worker)
    set_clock(admin)
    lost, kept = uuid4(), uuid4()
    watch(worker, lost)
    watcher = watch(worker, kept)
    for connection in (worker, admin):
        set_clock(connection, 59)
    watch(worker, kept, watcher=watcher)
    for connection in (worker, admin):
        set_clock(connection, 61)
    write_events(admin, lost, kept)
    assert payloads(listener) == [str(kept)]
    assert value(worker, "select upload_pipeline.forget_lost_watches()") == 1
    assert value(worker, "select upload_pipeline.forget_lost_watches()") == 0
    assert value(admin, "select array_agg(job_id) from upload_pipeline.job_watches") == [kept]


def test_watching_removes_what_others_have_left(admin: Connection, worker: Connection) -> None:
    watch(worker, uuid4(), ttl="-1 second")
    job = uuid4()
    watch(worker, job)
    assert value(admin, "select array_agg(job_id) from upload_pipeline.job_watches") == [job]


def test_watching_nothing_is_nothing(admin: Connection, worker: Connection) -> None:
    watch(worker)
    unwatch(worker, uuid4())
    assert value(admin, "select count(*) from upload_pipeline.job_watches") == 0


def test_who_dies_while_beginning_to_watch_watches_nothing(admin: Connection, connect: Connect) -> None:
    victim = connect()
    victim.execute("begin")
    watch(victim, uuid4())
    victim.close()
    assert value(admin, "select count(*) from upload_pipeline.job_watches") == 0


def test_a_watchers_lock_holds_up_no_transition(admin: Connection, worker: Connection, connect: Connect) -> None:
    job = add_job(admin, worker)
    other = connect()
    with other.transaction():
        watch(other, job)
        worker.execute("set lock_timeout = '1s'")
        cancel(worker, job)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        worker.execute("select from upload_pipeline.job_watches")
