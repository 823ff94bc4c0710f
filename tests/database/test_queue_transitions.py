from __future__ import annotations

import itertools
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    EPOCH,
    STAGES,
    add_document,
    add_job,
    advance,
    advance_many,
    advance_to,
    cancel,
    claim,
    claim_one,
    enqueue,
    event_codes,
    fail,
    job_row,
    job_rows,
    lane_ready,
    promote,
    reap,
    release,
    renew,
    retry,
    set_clock,
    snooze,
    terminate,
    value,
)


class LeaseOf:
    """A lease as a caller names it, which may be wrong."""

    def __init__(self, lease: Any, token: int | None = None) -> None:
        self.job_id: UUID = lease.job_id
        self.lease_token: int = lease.lease_token if token is None else token
        self.stage: str = getattr(lease, "stage", "queued")


def sqlstate(error: pytest.ExceptionInfo[psycopg.Error]) -> str | None:
    return error.value.sqlstate


@pytest.fixture
def lease(admin: Connection, worker: Connection) -> Any:
    """The one job there is, claimed at second 0."""
    set_clock(worker)
    add_job(admin, worker)
    return claim_one(worker)


# enqueue


def test_enqueuing_a_document_twice_gives_its_live_job_back(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    document = add_document(admin, user)
    first = worker.execute("select * from upload_pipeline.enqueue_job(%s, %s)", [document, user]).fetchone()
    again = worker.execute("select * from upload_pipeline.enqueue_job(%s, %s)", [document, user]).fetchone()
    assert (first.created, again.created) == (True, False)
    assert first.job_id == again.job_id
    assert event_codes(worker, first.job_id) == ["job_enqueued"]


def test_a_document_named_twice_in_one_call_gets_one_job(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    one, two = add_document(admin, user), add_document(admin, user)
    rows = worker.execute(
        "select * from upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[])", [[one, two, one], [user] * 3]
    ).fetchall()
    assert [row.document_id for row in rows] == [one, two, one]
    assert [row.created for row in rows] == [True, True, False]
    assert rows[0].job_id == rows[2].job_id
    assert len(job_rows(worker)) == 2


def test_a_document_whose_job_has_ended_gets_a_new_one(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    document = add_document(admin, user)
    first = enqueue(worker, document, user)
    cancel(worker, first)
    assert enqueue(worker, document, user) != first


def test_enqueuing_nothing_does_nothing(worker: Connection) -> None:
    assert worker.execute("select * from upload_pipeline.enqueue_jobs('{}', '{}')").fetchall() == []


@pytest.mark.parametrize(
    ("document_is_known", "user_is_owner", "pipeline", "state"),
    [(False, True, "document", "23503"), (True, False, "document", "23503"), (True, True, "nonesuch", "UP002")],
)
def test_an_enqueue_of_what_is_not_there_changes_nothing(
    admin: Connection, worker: Connection, document_is_known: bool, user_is_owner: bool, pipeline: str, state: str
) -> None:
    owner = uuid4()
    good, document = add_document(admin, owner), add_document(admin, owner) if document_is_known else uuid4()
    with pytest.raises(psycopg.Error) as error:
        worker.execute(
            "select upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[], %s)",
            [[good, document], [owner, owner if user_is_owner else uuid4()], pipeline],
        )
    assert sqlstate(error) == state
    assert job_rows(worker) == []
    assert value(worker, "select count(*) from upload_pipeline.lanes") == 0


def test_an_enqueue_with_fewer_users_than_documents_is_refused(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    documents = [add_document(admin, user), add_document(admin, user)]
    with pytest.raises(psycopg.errors.NotNullViolation):
        worker.execute("select upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[])", [documents, [user]])
    assert job_rows(worker) == []


# renew, check


def test_a_renewal_counts_from_now(worker: Connection, lease: Any) -> None:
    set_clock(worker, 20)
    assert renew(worker, [lease], ttl="60 seconds") == {lease.job_id: False}
    assert (job_row(worker, lease.job_id).lease_expires_at - EPOCH).total_seconds() == 80
    assert job_row(worker, lease.job_id).lease_token == lease.lease_token


def test_a_renewal_leaves_out_what_is_lost_and_keeps_the_rest(
    admin: Connection, worker: Connection, lease: Any
) -> None:
    add_job(admin, worker)
    other = claim_one(worker)
    retry(worker, lease.job_id, force=True)
    before = job_row(worker, lease.job_id)
    assert renew(worker, [lease, other, LeaseOf(other, 99)]) == {other.job_id: False}
    assert job_row(worker, lease.job_id) == before


def test_a_renewal_tells_of_a_wanted_cancel(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    assert renew(worker, [lease]) == {lease.job_id: True}


def test_a_renewal_of_nothing_is_the_workers_sign_of_life(worker: Connection) -> None:
    set_clock(worker)
    me = uuid4()
    worker.execute("select upload_pipeline.register_worker(%s, 'host', 1, 'v', '{default}', 4)", [me])
    set_clock(worker, 30)
    assert renew(worker, [], worker=me) == {}
    beat = value(worker, "select last_beat_at from upload_pipeline.workers where worker_id = %s", me)
    assert (beat - EPOCH).total_seconds() == 30


def test_a_lease_that_ran_out_unreaped_is_still_its_workers(worker: Connection, lease: Any) -> None:
    set_clock(worker, 1000)
    assert renew(worker, [lease]) == {lease.job_id: False}
    assert reap(worker) == 0


@pytest.mark.parametrize("loss", ["restart", "release", "reap", "end", "wrong token", "no such job"])
def test_a_lost_lease_undoes_the_transaction_that_checks_it(
    admin: Connection, worker: Connection, lease: Any, loss: str
) -> None:
    named = LeaseOf(lease)
    match loss:
        case "restart":
            retry(worker, lease.job_id, force=True)
        case "release":
            release(worker, [lease])
        case "reap":
            set_clock(worker, 61)
            assert reap(worker) == 1
        case "end":
            fail(worker, lease, retryable=False)
        case "wrong token":
            named.lease_token += 1
        case _:
            named.job_id = uuid4()
    with pytest.raises(psycopg.Error) as error, worker.transaction():  # noqa: PT012
        worker.execute("select upload_pipeline.register_worker(%s, 'h', 1, 'v', '{default}', 1)", [uuid4()])
        worker.execute("select upload_pipeline.check_lease(%s, %s)", [named.job_id, named.lease_token])
    assert sqlstate(error) == "UP001"
    assert value(worker, "select count(*) from upload_pipeline.workers") == 0


# advance


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


# fail


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


# snooze, release


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


# promote, reap


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


# retry, cancel


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


# lanes and the register of workers


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
