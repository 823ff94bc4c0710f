"""How jobs fail, wait, are handed back, promoted and reaped, each asked once, twice and wrongly."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from sessions import Connection
from verbs import (
    EPOCH,
    add_job,
    advance,
    cancel,
    claim,
    claim_one,
    event_codes,
    fail,
    job_row,
    job_rows,
    promote,
    reap,
    release,
    retry,
    set_clock,
    snooze,
    sqlstate,
    value,
)


@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.9), (0.5, 1.0), (0.999999, 1.1)])
def test_retries_come_after_3_6_and_12_seconds_and_then_the_job_is_dead(
    worker: Connection, lease: Any, jitter: float, factor: float
) -> None:
    now = 0.0
    for turn, wait in enumerate((3, 6, 12), start=1):
        answer = fail(worker, lease, jitter=jitter)
        assert (answer.state, answer.retry_count) == ("retryable", turn)
        due = (answer.run_at - EPOCH).total_seconds()
        assert due - now == pytest.approx(wait * factor, rel=1e-4)
        set_clock(worker, due - 0.001)
        assert promote(worker) == 0
        set_clock(worker, due)
        assert promote(worker) == 1
        now = due
        lease = claim_one(worker)
        assert lease.retry_count == turn
    answer = fail(worker, lease)
    assert (answer.state, answer.retry_count, answer.run_at) == ("deadletter", 3, None)
    assert promote(worker) == 0
    assert claim(worker) == []
    assert [code for code in event_codes(worker, lease.job_id) if code in ("job_failed", "job_deadlettered")] == [
        "job_failed",
        "job_failed",
        "job_failed",
        "job_deadlettered",
    ]


def test_drawn_jitter_stays_within_a_tenth_and_varies(worker: Connection) -> None:
    rows = worker.execute(
        "select extract(epoch from upload_pipeline.retry_delay(1))::float8 from generate_series(1, 500)"
    ).fetchall()
    waits = [row[0] for row in rows]
    assert all(5.4 <= wait <= 6.6 for wait in waits)
    assert max(waits) - min(waits) > 0.6


def test_the_backoff_base_is_a_setting(worker: Connection) -> None:
    worker.execute("set upload_pipeline.backoff_base = '60 milliseconds'")
    assert value(worker, "select extract(epoch from upload_pipeline.retry_delay(2, 0.5))::float8") == pytest.approx(
        0.24
    )


@pytest.mark.parametrize("retryable", [False, None])
def test_an_error_that_no_retry_mends_ends_the_job_at_once(
    worker: Connection, lease: Any, retryable: bool | None
) -> None:
    assert fail(worker, lease, retryable=retryable).state == "deadletter"  # type: ignore[arg-type]
    outcome = worker.execute("select * from upload_pipeline.job_outcomes").fetchone()
    assert (outcome.error_code, outcome.error_message) == ("PARSER_FAILED", "it broke")
    with pytest.raises(psycopg.Error) as error:
        advance(worker, lease, "queued", "job_validated")
    assert sqlstate(error) == "UP001"


def test_a_failure_with_a_wanted_cancel_ends_cancelled(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    assert fail(worker, lease).state == "cancelled"


@pytest.mark.parametrize("how", ["retryable", "deadletter", "cancelled"])
def test_a_failure_told_again_is_answered_the_same_and_writes_nothing(worker: Connection, lease: Any, how: str) -> None:
    if how == "cancelled":
        cancel(worker, lease.job_id)
    first = fail(worker, lease, retryable=how != "deadletter", jitter=None)
    assert first.state == how
    before = job_rows(worker), event_codes(worker, lease.job_id)
    set_clock(worker, 2)
    assert fail(worker, lease, retryable=how != "deadletter", jitter=None) == first
    assert (job_rows(worker), event_codes(worker, lease.job_id)) == before


def test_a_failure_told_again_is_answered_the_same_though_the_job_has_gone_on(worker: Connection, lease: Any) -> None:
    first = fail(worker, lease)
    set_clock(worker, 4)
    promote(worker)
    theirs = claim_one(worker)
    before = job_rows(worker)
    assert fail(worker, lease) == first
    assert job_rows(worker) == before
    assert fail(worker, theirs).retry_count == 2


@pytest.mark.parametrize("end", ["reaped", "snoozed", "released", "restarted", "another failure"])
def test_a_failure_of_a_lease_that_ended_otherwise_is_refused(worker: Connection, lease: Any, end: str) -> None:
    if end == "reaped":
        set_clock(worker, 61)
        assert reap(worker) == 1
    elif end == "snoozed":
        snooze(worker, lease)
    elif end == "released":
        release(worker, [lease])
    elif end == "restarted":
        retry(worker, lease.job_id, force=True)
    else:
        fail(worker, lease, code="PARSE_FAILED")
    before = job_rows(worker), event_codes(worker, lease.job_id)
    with pytest.raises(psycopg.Error) as error:
        fail(worker, lease, code="WORKER_LOST")
    assert sqlstate(error) == "UP001"
    assert (job_rows(worker), event_codes(worker, lease.job_id)) == before


def test_a_code_that_is_no_code_is_refused_and_changes_nothing(worker: Connection, lease: Any) -> None:
    before = job_rows(worker)
    with pytest.raises(psycopg.errors.CheckViolation):
        fail(worker, lease, code="not a code")
    assert job_rows(worker) == before


def test_a_long_message_is_cut(worker: Connection, lease: Any) -> None:
    worker.execute(
        "select upload_pipeline.fail_job(%s, %s, 'X', repeat('é', 9000), true)", [lease.job_id, lease.lease_token]
    )
    assert value(worker, "select length(error_message) from upload_pipeline.job_outcomes") == 4000


def test_a_snooze_counts_no_retry_and_comes_back_when_due(worker: Connection, lease: Any) -> None:
    assert snooze(worker, lease, "30 seconds") is not None
    row = job_row(worker, lease.job_id)
    assert (row.state, row.retry_count, (row.run_at - EPOCH).total_seconds()) == ("retryable", 0, 30)
    with pytest.raises(psycopg.Error) as error:
        snooze(worker, lease)
    assert sqlstate(error) == "UP001"
    set_clock(worker, 30)
    assert promote(worker) == 1
    assert claim_one(worker).lease_token == lease.lease_token + 1


def test_a_snooze_with_a_wanted_cancel_ends_the_job(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    assert snooze(worker, lease) is None
    assert job_row(worker, lease.job_id).state == "cancelled"


def test_a_snooze_without_an_end_is_refused(worker: Connection, lease: Any) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation):
        snooze(worker, lease, None)  # type: ignore[arg-type]
    assert job_row(worker, lease.job_id).state == "working"


def test_a_release_leaves_the_counts_alone(worker: Connection, lease: Any) -> None:
    fail(worker, lease)
    set_clock(worker, 4)
    promote(worker)
    lease = claim_one(worker)
    assert release(worker, [lease]) == {lease.job_id: "queued"}
    row = job_row(worker, lease.job_id)
    assert (row.state, row.retry_count, row.stage, row.worker_id) == ("queued", 1, "queued", None)
    assert release(worker, [lease]) == {}
    assert event_codes(worker, lease.job_id).count("job_released") == 1


def test_a_release_leaves_out_the_stale_and_ends_what_is_to_be_cancelled(
    admin: Connection, worker: Connection, lease: Any
) -> None:
    for _ in range(2):
        add_job(admin, worker)
    back, wanted = claim(worker, limit=2)
    cancel(worker, wanted.job_id)
    retry(worker, lease.job_id, force=True)
    assert release(worker, [lease, back, wanted]) == {back.job_id: "queued", wanted.job_id: "cancelled"}
    assert release(worker, []) == {}


def test_a_promotion_takes_no_more_than_asked_and_the_most_overdue_first(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    jobs = [add_job(admin, worker) for _ in range(3)]
    for delay, held in zip(
        (30, 10, 20), sorted(claim(worker, limit=3), key=lambda x: jobs.index(x.job_id)), strict=True
    ):
        snooze(worker, held, f"{delay} seconds")
    set_clock(worker, 60)
    assert promote(worker, limit=2) == 2
    assert [job_row(worker, job).state for job in jobs] == ["retryable", "queued", "queued"]
    assert promote(worker, limit=2) == 1
    assert promote(worker) == 0


def test_a_reaped_job_counts_an_attempt_and_dies_after_the_third_retry(worker: Connection, lease: Any) -> None:
    now = 0.0
    for turn in (1, 2, 3):
        set_clock(worker, now + 60)
        assert reap(worker) == 0  # the lease still covers this instant
        set_clock(worker, now + 60.001)
        assert reap(worker) == 1
        row = job_row(worker, lease.job_id)
        assert (row.state, row.retry_count) == ("retryable", turn)
        assert row.lease_token == lease.lease_token
        wait = (row.run_at - EPOCH).total_seconds() - now - 60.001
        assert wait == pytest.approx(3 * 2 ** (turn - 1), rel=0.101)
        now += 100
        set_clock(worker, now)
        assert promote(worker) == 1
        lease = claim_one(worker)
    set_clock(worker, now + 61)
    assert reap(worker) == 1
    row = job_row(worker, lease.job_id)
    assert (row.state, row.retry_count) == ("deadletter", 3)
    assert value(worker, "select error_code from upload_pipeline.job_outcomes") == "WORKER_LOST"
    assert event_codes(worker, lease.job_id)[-1] == "job_deadlettered"
    assert reap(worker) == 0


def test_a_reaped_job_with_a_wanted_cancel_ends_cancelled(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    set_clock(worker, 61)
    assert reap(worker) == 1
    row = job_row(worker, lease.job_id)
    assert (row.state, row.retry_count) == ("cancelled", 0)


def test_a_reap_takes_no_more_than_asked(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    for _ in range(5):
        add_job(admin, worker)
    claim(worker, limit=5)
    set_clock(worker, 61)
    assert [reap(worker, limit=3), reap(worker, limit=3), reap(worker, limit=3)] == [3, 2, 0]
