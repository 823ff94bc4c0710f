"""Steps from stage to stage, by one and in groups, asked once, twice, wrongly and in the middle of a crash."""

from __future__ import annotations

import itertools
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    EPOCH,
    STAGES,
    add_job,
    advance,
    advance_many,
    advance_to,
    cancel,
    claim,
    claim_one,
    event_codes,
    fail,
    job_row,
    job_rows,
    lane_ready,
    promote,
    release,
    renew,
    retry,
    set_clock,
    snooze,
    sqlstate,
    terminate,
    value,
)


def test_a_job_led_through_all_stages_ends_done_with_one_event_a_step(worker: Connection, lease: Any) -> None:
    for position, (here, there) in enumerate(itertools.pairwise(STAGES)):
        set_clock(worker, position + 1)
        row = advance(worker, lease, here, there)
        final = there == "embedded"
        assert (row.stage, row.state) == (there, "done" if final else "working")
        if not final:
            assert (row.lease_expires_at - EPOCH).total_seconds() == position + 61
    row = job_row(worker, lease.job_id)
    assert (row.state, row.worker_id, row.lease_expires_at) == ("done", None, None)
    assert (row.finished_at - EPOCH).total_seconds() == 10
    assert event_codes(worker, lease.job_id) == ["job_enqueued", "job_claimed", *["job_advanced"] * 9, "job_done"]


def test_an_advance_asked_again_answers_the_same_and_writes_nothing(worker: Connection, lease: Any) -> None:
    first = advance(worker, lease, "queued", "job_validated")
    before = job_rows(worker), event_codes(worker, lease.job_id)
    set_clock(worker, 5)
    assert advance(worker, lease, "queued", "job_validated") == first
    assert (job_rows(worker), event_codes(worker, lease.job_id)) == before


def test_the_last_advance_asked_again_answers_done(worker: Connection, lease: Any) -> None:
    advance_to(worker, lease, "embeddings_buffered")
    for _ in range(2):
        assert advance(worker, lease, "embeddings_buffered", "embedded", results='{"n": 1}').state == "done"
    assert event_codes(worker, lease.job_id).count("job_done") == 1


def test_an_advance_without_keep_hands_the_job_on(worker: Connection, lease: Any) -> None:
    row = advance(worker, lease, "queued", "job_validated", keep=False)
    assert (row.state, row.lease_expires_at) == ("queued", None)
    assert lane_ready(worker, job_row(worker, lease.job_id).user_id)
    assert claim_one(worker).stage == "job_validated"
    with pytest.raises(psycopg.Error) as error:
        advance(worker, lease, "job_validated", "parsing")
    assert sqlstate(error) == "UP001"


def test_a_stage_with_a_pool_of_its_own_gets_the_job_whatever_keep_says(
    admin: Connection, worker: Connection, lease: Any
) -> None:
    admin.execute("update upload_pipeline.stages set pool = 'parse' where stage = 'parsing'")
    assert advance(worker, lease, "queued", "job_validated").state == "working"
    assert advance(worker, lease, "job_validated", "parsing").state == "queued"
    assert claim(worker) == []
    theirs = claim_one(worker, pool="parse")
    assert theirs.stage == "parsing"
    assert advance(worker, theirs, "parsing", "parsed").state == "queued"
    assert claim_one(worker).stage == "parsed"
    assert event_codes(worker, lease.job_id)[-4:] == ["job_handed_on", "job_claimed", "job_handed_on", "job_claimed"]


@pytest.mark.parametrize(
    ("here", "there"), [("queued", "parsing"), ("parsed", "parse_validated"), ("queued", "nowhere")]
)
def test_a_stage_that_does_not_follow_is_refused(worker: Connection, lease: Any, here: str, there: str) -> None:
    before = job_rows(worker)
    with pytest.raises(psycopg.Error) as error:
        advance(worker, lease, here, there)
    assert sqlstate(error) == "UP004"
    assert job_rows(worker) == before


def test_one_wrong_stage_in_a_group_moves_none(admin: Connection, worker: Connection, lease: Any) -> None:
    add_job(admin, worker)
    other = claim_one(worker)
    before = job_rows(worker)
    with pytest.raises(psycopg.Error) as error:
        advance_many(
            worker,
            [
                (lease.job_id, lease.lease_token, "queued", "job_validated", True),
                (other.job_id, other.lease_token, "queued", "parsed", True),
            ],
        )
    assert sqlstate(error) == "UP004"
    assert job_rows(worker) == before


def test_a_group_moves_its_sound_members_and_leaves_out_the_stale(
    admin: Connection, worker: Connection, lease: Any
) -> None:
    for _ in range(3):
        add_job(admin, worker)
    sound, ending, handed = claim(worker, limit=3)
    retry(worker, lease.job_id, force=True)
    advance_to(worker, ending, "embeddings_buffered")
    before = job_row(worker, lease.job_id)
    answers = advance_many(
        worker,
        [
            (lease.job_id, lease.lease_token, "queued", "job_validated", True),
            (sound.job_id, sound.lease_token, "queued", "job_validated", True),
            (uuid4(), 1, "queued", "job_validated", True),
            (ending.job_id, ending.lease_token, "embeddings_buffered", "embedded", True),
            (handed.job_id, handed.lease_token, "queued", "job_validated", False),
        ],
    )
    states = {job: answer.state for job, answer in answers.items()}
    assert states == {sound.job_id: "working", ending.job_id: "done", handed.job_id: "queued"}
    assert job_row(worker, lease.job_id) == before
    assert advance_many(worker, []) == {}


def test_a_wanted_cancel_ends_the_job_at_its_next_step(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    assert advance(worker, lease, "queued", "job_validated").state == "cancelled"
    assert event_codes(worker, lease.job_id)[-2:] == ["job_cancel_requested", "job_cancelled"]
    assert renew(worker, [lease]) == {}


def test_a_job_that_reaches_its_end_is_done_though_a_cancel_was_wanted(worker: Connection, lease: Any) -> None:
    advance_to(worker, lease, "embeddings_buffered")
    cancel(worker, lease.job_id)
    assert advance(worker, lease, "embeddings_buffered", "embedded").state == "done"


def test_the_next_stage_starts_with_its_retries_unspent(worker: Connection, lease: Any) -> None:
    assert fail(worker, lease).retry_count == 1
    set_clock(worker, 4)
    promote(worker)
    lease = claim_one(worker)
    assert lease.retry_count == 1
    advance(worker, lease, "queued", "job_validated")
    assert job_row(worker, lease.job_id).retry_count == 0


def test_results_replace_an_earlier_error(worker: Connection, lease: Any) -> None:
    fail(worker, lease)
    set_clock(worker, 4)
    promote(worker)
    lease = claim_one(worker)
    advance_to(worker, lease, "embeddings_buffered")
    advance(worker, lease, "embeddings_buffered", "embedded", results='{"chunks": 7}')
    row = worker.execute("select * from upload_pipeline.job_outcomes").fetchone()
    assert (row.results, row.error_code, row.error_message) == ({"chunks": 7}, None, None)


@pytest.mark.parametrize(
    "verb", ["claim", "renew", "advance", "finish", "fail", "snooze", "release", "cancel", "retry"]
)
def test_a_verb_whose_connection_is_cut_before_the_commit_changes_nothing(
    admin: Connection, worker: Connection, connect: Connect, lease: Any, verb: str
) -> None:
    add_job(admin, worker)
    if verb == "finish":
        advance_to(worker, lease, "embeddings_buffered")
    before = job_rows(worker), value(worker, "select count(*) from upload_pipeline.events")
    victim = connect()
    set_clock(victim, 1)
    victim.execute("begin")
    calls: dict[str, Any] = {
        "claim": lambda: claim(victim),
        "renew": lambda: renew(victim, [lease]),
        "advance": lambda: advance(victim, lease, "queued", "job_validated", keep=False),
        "finish": lambda: advance(victim, lease, "embeddings_buffered", "embedded"),
        "fail": lambda: fail(victim, lease),
        "snooze": lambda: snooze(victim, lease),
        "release": lambda: release(victim, [lease]),
        "cancel": lambda: cancel(victim, lease.job_id),
        "retry": lambda: retry(victim, lease.job_id, force=True),
    }
    assert calls[verb]()
    terminate(admin, victim)
    assert (job_rows(worker), value(worker, "select count(*) from upload_pipeline.events")) == before
    assert renew(worker, [lease]) == {lease.job_id: False}
    assert len(claim(worker, limit=5)) == 1
