"""Months of events: made ahead, filled though they came late, dropped when they are over."""

from __future__ import annotations

from sessions import Connect, Connection
from verbs import (
    await_lock_wait,
    in_background,
    set_clock,
    value,
)


def partitions(admin: Connection) -> set[str]:
    rows = admin.execute(
        "select inhrelid::regclass::text as name from pg_catalog.pg_inherits "
        "where inhparent = 'upload_pipeline.events'::regclass"
    ).fetchall()
    return {row.name.removeprefix("upload_pipeline.") for row in rows}


def test_months_are_made_ahead_once(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    assert value(worker, "select upload_pipeline.ensure_event_partitions(2)") == 3
    assert value(worker, "select upload_pipeline.ensure_event_partitions(2)") == 0
    assert {"events_2031_05", "events_2031_06", "events_2031_07", "events_default"} <= partitions(admin)


def test_an_event_of_no_month_is_caught_and_moved_when_its_month_is_made(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    worker.execute("select upload_pipeline.record_event('worker_started')")
    assert value(admin, "select count(*) from upload_pipeline.events_default") == 1
    worker.execute("select upload_pipeline.ensure_event_partitions(0)")
    assert value(admin, "select count(*) from upload_pipeline.events_default") == 0
    assert value(admin, "select count(*) from upload_pipeline.events_2031_05") == 1


def test_an_event_that_is_being_written_while_its_month_is_made_is_moved_too(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    set_clock(worker)
    other = connect()
    set_clock(other)
    worker.execute("begin")
    worker.execute("select upload_pipeline.record_event('worker_started')")
    made = in_background(other.execute, "select upload_pipeline.ensure_event_partitions(0)")
    await_lock_wait(admin, other)
    worker.execute("commit")
    made.result(timeout=10)
    assert value(admin, "select count(*) from upload_pipeline.events_2031_05") == 1


def test_two_runs_at_once_make_each_month_once(admin: Connection, worker: Connection, connect: Connect) -> None:
    set_clock(worker)
    other = connect()
    set_clock(other)
    with worker.transaction():
        assert value(worker, "select upload_pipeline.ensure_event_partitions(1)") == 2
        second = in_background(value, other, "select upload_pipeline.ensure_event_partitions(1)")
        await_lock_wait(admin, other)
    assert second.result(timeout=10) == 0


def test_only_months_that_ended_before_are_dropped(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    worker.execute("select upload_pipeline.ensure_event_partitions(2)")
    dropped = admin.execute("select * from upload_pipeline.drop_event_partitions('2031-06-30 23:59+00')").fetchall()
    assert "events_2031_05" in {row[0] for row in dropped}
    assert {"events_2031_06", "events_2031_07", "events_default"} <= partitions(admin)
    assert "events_2031_05" not in partitions(admin)
