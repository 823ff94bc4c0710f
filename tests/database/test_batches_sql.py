"""Batches: made with all their documents or not at all, counted from rows, noted once, retried, cancelled."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from batch_members import counts, failures, file_member, finish_job, make_batch, note, overview, refused_member
from sessions import Connect, Connection
from verbs import (
    await_lock_wait,
    cancel,
    claim,
    claim_one,
    fail,
    in_background,
    job_row,
    lane_ready,
    retry,
    set_clock,
    terminate,
    value,
)


@pytest.fixture
def user() -> UUID:
    return uuid4()


def events(db: Connection, code: str) -> list[Any]:
    rows = db.execute("select * from upload_pipeline.events where code = %s order by event_id", [code]).fetchall()
    return [row.payload for row in rows]


def delete_document(db: Connection, document: UUID) -> None:
    db.execute("select * from upload_pipeline.begin_deletion(%s)", [document])
    assert value(db, "select upload_pipeline.finish_deletion(%s)", document)


def test_a_batch_is_made_with_its_documents_jobs_and_events(worker: Connection, user: UUID) -> None:
    batch = uuid4()
    asked = [file_member(user, 0, b"b"), refused_member(1), file_member(user, 2, b"a", "two.txt")]
    made = make_batch(worker, user, asked, batch)
    assert [(row.ordinal, row.filename, row.duplicate, row.error_code) for row in made] == [
        (0, "0.txt", False, None),
        (1, "1.pdf", False, "EMPTY_FILE"),
        (2, "two.txt", False, None),
    ]
    assert [str(row.document_id) for row in made if row.document_id] == [
        asked[0]["document_id"],
        asked[2]["document_id"],
    ]
    assert job_row(worker, made[0].job_id).seq < job_row(worker, made[2].job_id).seq
    assert lane_ready(worker, user)
    document = worker.execute("select * from upload_pipeline.documents where filename = 'two.txt'").fetchone()
    assert (document.metadata, document.raw_key) == ({"department": "claims"}, asked[2]["raw_key"])
    assert job_row(worker, made[0].job_id).correlation_id == "c-1"
    assert counts(worker, batch) == (0, 1, 2, "in_progress")
    assert overview(worker, batch).warnings == ["a warning"]
    assert events(worker, "batch_accepted") == [{"batch_id": str(batch), "total": 3, "documents": 2}]
    assert [one["batch_id"] for one in events(worker, "document_accepted")] == [str(batch)] * 2


def test_asking_again_answers_the_same_and_makes_nothing(worker: Connection, user: UUID) -> None:
    batch = uuid4()
    first = make_batch(worker, user, [file_member(user, 0, b"a"), refused_member(1)], batch)
    before = value(worker, "select count(*) from upload_pipeline.events")
    assert make_batch(worker, user, [file_member(user, 0, b"a"), refused_member(1)], batch) == first
    assert value(worker, "select count(*) from upload_pipeline.events") == before


def test_bytes_that_are_there_are_their_first_document_and_job(
    admin: Connection, worker: Connection, user: UUID
) -> None:
    batch, later = uuid4(), uuid4()
    first, again, other = make_batch(
        worker, user, [file_member(user, 0, b"a"), file_member(user, 1, b"a"), file_member(user, 2, b"b")], batch
    )
    assert (again.document_id, again.job_id, again.duplicate) == (first.document_id, first.job_id, True)
    assert (first.duplicate, other.duplicate) == (False, False)
    finish_job(admin, claim_one(worker))
    assert counts(worker, batch) == (2, 0, 1, "in_progress")
    (member,) = make_batch(worker, user, [file_member(user, 0, b"a", "other name.txt")], later)
    assert (member.job_id, member.duplicate, member.filename) == (first.job_id, True, "other name.txt")
    assert counts(worker, later) == (1, 0, 0, "completed")
    stranger = uuid4()
    assert make_batch(worker, stranger, [file_member(stranger, 0, b"a")])[0].duplicate is False


def test_bytes_of_a_document_that_is_being_deleted_are_refused_and_the_rest_is_not(
    worker: Connection, user: UUID
) -> None:
    (first,) = make_batch(worker, user, [file_member(user, 0, b"a")])
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [first.document_id])
    batch = uuid4()
    refused, taken = make_batch(worker, user, [file_member(user, 0, b"a"), file_member(user, 1, b"b")], batch)
    assert (refused.document_id, refused.job_id, refused.error_code) == (None, None, "INVALID_STATE")
    assert taken.error_code is None
    assert counts(worker, batch) == (0, 1, 1, "in_progress")


def test_what_cannot_be_leaves_nothing(worker: Connection, user: UUID) -> None:
    wrong = {**file_member(user, 1, b"b"), "file_sha256": "not one"}
    with pytest.raises(psycopg.errors.CheckViolation):
        make_batch(worker, user, [file_member(user, 0, b"a"), wrong])
    with pytest.raises(psycopg.errors.CheckViolation):
        make_batch(worker, user, [])
    for table in ("batches", "batch_members", "documents", "upload_jobs", "events"):
        assert value(worker, f"select count(*) from upload_pipeline.{table}") == 0


def test_a_batch_whose_connection_dies_leaves_nothing(
    admin: Connection, worker: Connection, connect: Connect, user: UUID
) -> None:
    victim, batch = connect(), uuid4()
    victim.execute("begin")
    make_batch(victim, user, [file_member(user, 0, b"a")], batch)
    second = in_background(make_batch, worker, user, [file_member(user, 0, b"a")], batch)
    await_lock_wait(admin, worker)
    terminate(admin, victim)
    (member,) = second.result(timeout=10)
    assert member.duplicate is False
    assert counts(worker, batch) == (0, 0, 1, "in_progress")


def test_batches_and_single_files_with_the_same_bytes_never_deadlock(
    worker: Connection, connect: Connect, user: UUID
) -> None:
    contents = [bytes([n]) for n in range(12)]

    def single(db: Connection, content: bytes) -> None:
        one = file_member(user, 0, content)
        db.execute(
            "select * from upload_pipeline.accept_document(%s, %s, 'x', 'text/plain', %s, %s, %s)",
            [one["document_id"], user, one["file_bytes"], one["file_sha256"], one["raw_key"]],
        )

    def many(db: Connection, order: list[bytes]) -> None:
        make_batch(db, user, [file_member(user, n, content) for n, content in enumerate(order)])

    for _ in range(5):
        running = [in_background(many, connect(), contents[::step]) for step in (1, -1, 2)]
        running += [in_background(single, connect(), contents[n]) for n in (11, 5)]
        for future in running:
            future.result(timeout=20)
        contents = [content + b"x" for content in contents]
    documents = value(worker, "select count(*) from upload_pipeline.documents")
    assert (documents, value(worker, "select count(*) from upload_pipeline.upload_jobs")) == (60, 60)
    rows = worker.execute("select batch_id from upload_pipeline.batches").fetchall()
    assert len(rows) == 15
    for row in rows:
        counts(worker, row.batch_id)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("dd", (2, 0, 0, "completed")),
        ("df", (1, 1, 0, "partial_failure")),
        ("ff", (0, 2, 0, "failed")),
        ("fc", (0, 2, 0, "failed")),
        ("d", (1, 0, 1, "in_progress")),
        ("f", (0, 1, 1, "in_progress")),
    ],
)
def test_the_status_follows_the_jobs(
    admin: Connection, worker: Connection, user: UUID, ends: str, expected: tuple[int, int, int, str]
) -> None:
    for db in (admin, worker):
        set_clock(db, 0)
    batch = uuid4()
    make_batch(worker, user, [file_member(user, 0, b"a"), file_member(user, 1, b"b")], batch)
    for db in (admin, worker):
        set_clock(db, 30)
    for end in ends:
        (lease,) = claim(worker)
        if end == "d":
            finish_job(admin, lease)
        else:
            if end == "c":
                cancel(worker, lease.job_id)
            fail(worker, lease, retryable=False, code="PARSE_FAILED")
    assert counts(worker, batch) == expected
    row = overview(worker, batch)
    assert (row.completed_at is None) == (expected[3] == "in_progress")
    if row.completed_at is not None:
        assert (row.completed_at - row.created_at).total_seconds() == 30
    codes = {"f": "PARSE_FAILED", "c": "CANCELLED"}
    assert failures(worker, batch) == {n: codes[end] for n, end in enumerate(ends) if end in codes}


def test_a_member_whose_document_goes_stays_what_it_was(admin: Connection, worker: Connection, user: UUID) -> None:
    batch = uuid4()
    done, ready, busy, last = make_batch(
        worker, user, [file_member(user, n, content) for n, content in enumerate((b"a", b"b", b"c", b"d"))], batch
    )
    finish_job(admin, claim_one(worker))
    assert claim_one(worker).job_id == ready.job_id
    for member in (done, ready, busy):
        delete_document(worker, member.document_id)
        counts(worker, batch)
    assert counts(worker, batch) == (1, 2, 1, "in_progress")
    assert failures(worker, batch) == {1: "DOCUMENT_NOT_FOUND", 2: "DOCUMENT_NOT_FOUND"}
    admin.execute("delete from upload_pipeline.upload_jobs where job_id = %s", [last.job_id])
    assert counts(worker, batch) == (1, 3, 0, "partial_failure")
    assert overview(worker, batch).completed_at is not None


def test_a_completed_batch_is_noted_once(admin: Connection, worker: Connection, connect: Connect, user: UUID) -> None:
    batch, hopeless = uuid4(), uuid4()
    make_batch(worker, user, [file_member(user, 0, b"a"), refused_member(1)], batch)
    make_batch(worker, user, [refused_member(0)], hopeless)
    assert [(row.batch_id, row.status) for row in note(worker)] == [(hopeless, "failed")]
    assert note(worker, batch) == []
    lease = claim_one(worker)
    finish_job(admin, lease)
    rival = connect()
    rival.execute("begin")
    (noted,) = note(rival)
    assert (noted.batch_id, noted.status, noted.total, noted.processed, noted.failed, noted.correlation_id) == (
        batch, "partial_failure", 2, 1, 1, "c-1",
    )  # fmt: skip
    assert note(worker) == []  # passed over: the other has it
    rival.execute("rollback")
    assert [row.batch_id for row in note(worker)] == [batch]
    assert note(worker) == note(worker, batch) == []
    assert [one["status"] for one in events(worker, "batch_completed")] == ["failed", "partial_failure"]


def test_what_failed_is_retried_and_the_rest_is_not(admin: Connection, worker: Connection, user: UUID) -> None:
    batch = uuid4()
    contents = [b"a", b"b", b"b", b"c", b"d"]
    members = [file_member(user, n, content) for n, content in enumerate(contents)]
    made = make_batch(worker, user, [*members, refused_member(5)], batch)
    finish_job(admin, claim_one(worker))
    fail(worker, claim_one(worker), retryable=False, code="PARSE_FAILED")
    cancel(worker, made[3].job_id)
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [made[4].document_id])
    assert counts(worker, batch) == (1, 5, 0, "partial_failure")
    assert len(note(worker)) == 1

    rows = worker.execute("select * from upload_pipeline.retry_batch(%s)", [batch]).fetchall()
    assert [(row.ordinal, row.retried, row.error_code) for row in rows] == [
        (1, True, None),
        (2, True, None),
        (3, True, None),
        (4, False, "INVALID_STATE"),
        (5, False, "EMPTY_FILE"),
    ]
    assert "being deleted" in rows[3].error_message
    assert counts(worker, batch) == (1, 2, 3, "in_progress")
    assert note(worker) == []
    for lease in claim(worker, limit=2):
        finish_job(admin, lease)
    assert counts(worker, batch) == (4, 2, 0, "partial_failure")
    assert len(note(worker)) == 1
    again = worker.execute("select * from upload_pipeline.retry_batch(%s)", [batch]).fetchall()
    assert [row.retried for row in again] == [False, False]
    with pytest.raises(psycopg.Error) as caught:
        worker.execute("select * from upload_pipeline.retry_batch(%s)", [uuid4()])
    assert caught.value.sqlstate == "UP002"


def test_a_retry_of_the_batch_and_one_of_its_jobs_do_not_wait_in_a_circle(
    admin: Connection, worker: Connection, connect: Connect, user: UUID
) -> None:
    batch = uuid4()
    made = make_batch(worker, user, [file_member(user, n, bytes([n])) for n in range(3)], batch)
    for member in made:
        cancel(worker, member.job_id)
    last = max(made, key=lambda member: member.job_id)
    rival = connect()
    rival.execute("begin")
    retry(rival, last.job_id)  # has the job and the lane
    whole = in_background(worker.execute, "select * from upload_pipeline.retry_batch(%s)", [batch])
    await_lock_wait(admin, worker)
    rival.execute("commit")
    assert sorted(row.retried for row in whole.result(timeout=10).fetchall()) == [True, True]
    assert counts(worker, batch) == (0, 0, 3, "in_progress")


def test_a_batch_is_cancelled_but_for_jobs_that_others_began(admin: Connection, worker: Connection, user: UUID) -> None:
    (before,) = make_batch(worker, user, [file_member(user, 0, b"before")])
    batch = uuid4()
    contents = [b"before", b"a", b"b", b"c"]
    made = make_batch(worker, user, [file_member(user, n, content) for n, content in enumerate(contents)], batch)
    worker.execute("select upload_pipeline.set_lane_cap(%s, 'default', 10)", [user])
    finish_job(admin, claim(worker, limit=2)[1])
    rows = worker.execute("select * from upload_pipeline.cancel_batch(%s)", [batch]).fetchall()
    assert {row.job_id: row.state for row in rows} == {made[2].job_id: "cancelled", made[3].job_id: "cancelled"}
    assert counts(worker, batch) == (1, 2, 1, "in_progress")
    assert failures(worker, batch) == {2: "CANCELLED", 3: "CANCELLED"}
    assert job_row(worker, before.job_id).state == "working"
    assert worker.execute("select * from upload_pipeline.cancel_batch(%s)", [batch]).fetchall() == []
    with pytest.raises(psycopg.Error) as caught:
        worker.execute("select * from upload_pipeline.cancel_batch(%s)", [uuid4()])
    assert caught.value.sqlstate == "UP002"


def test_the_status_reads_the_batchs_own_rows_only(admin: Connection, worker: Connection, user: UUID) -> None:
    batch = uuid4()
    for number in range(30):
        members = [file_member(user, n, f"{number} {n}".encode()) for n in range(100)]
        make_batch(worker, user, members, batch if number == 7 else None)
    admin.execute("analyze upload_pipeline.upload_jobs, upload_pipeline.batches, upload_pipeline.batch_members")
    (answer,) = worker.execute(
        "explain (analyze, format json) select * from upload_pipeline.batch_overview where batch_id = %s",
        [batch],
    )
    plan = answer[0][0]["Plan"]
    assert plan["Actual Rows"] == 1
    jobs = [node for node in nodes(plan) if node.get("Relation Name") == "upload_jobs"]
    assert [(node["Node Type"], node["Actual Loops"]) for node in jobs] == [("Index Scan", 100)]
    read = sum(node["Actual Rows"] for node in nodes(plan) if node.get("Relation Name") == "batch_members")
    assert read == 100


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes of a plan."""
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


def test_documents_that_await_these_bytes_have_them_now(admin: Connection, worker: Connection, user: UUID) -> None:
    contents = [b"a", b"b", b"c"]
    members = [file_member(user, n, content) for n, content in enumerate(contents)]
    reserved = [
        worker.execute(
            "select * from upload_pipeline.reserve_document(%s, %s, 'early.txt', 'text/plain', 1, %s, %s, '1 minute')",
            [one["document_id"], user, one["file_sha256"], one["raw_key"]],
        ).fetchone()
        for one in members[:2]
    ]
    cancel(worker, reserved[1].job_id)
    batch = uuid4()
    made = make_batch(worker, user, [*members, file_member(user, 3, b"a")], batch)
    assert [member.duplicate for member in made] == [False, False, False, True]
    assert [member.job_id for member in made[:2]] == [one.job_id for one in reserved]
    rows = worker.execute("select * from upload_pipeline.documents order by filename").fetchall()
    assert [(row.filename, row.upload_deadline) for row in rows] == [("0.txt", None), ("1.txt", None), ("2.txt", None)]
    assert counts(worker, batch) == (0, 0, 4, "in_progress")
    worker.execute("select upload_pipeline.set_lane_cap(%s, 'default', 9)", [user])
    for lease in claim(worker, limit=9):
        finish_job(admin, lease)
    assert counts(worker, batch) == (4, 0, 0, "completed")
    assert events(worker, "batch_accepted") == [{"batch_id": str(batch), "total": 4, "documents": 3}]
