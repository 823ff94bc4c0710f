"""What enqueues jobs, renews leases and checks them, asked once, twice, wrongly and in the middle of a crash."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connection
from verbs import (
    EPOCH,
    add_document,
    add_job,
    cancel,
    claim_one,
    enqueue,
    event_codes,
    fail,
    job_row,
    job_rows,
    reap,
    release,
    renew,
    retry,
    set_clock,
    sqlstate,
    value,
)


class LeaseOf:
    """A lease as a caller names it, which may be wrong."""

    def __init__(self, lease: Any, token: int | None = None) -> None:
        self.job_id: UUID = lease.job_id
        self.lease_token: int = lease.lease_token if token is None else token
        self.stage: str = getattr(lease, "stage", "queued")


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
