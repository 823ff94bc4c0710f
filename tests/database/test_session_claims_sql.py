"""Sessions claimed by a user, with all that hangs on them."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from batch_members import file_member, make_batch, overview, refused_member
from session_verbs import (
    claim_session,
    end_session,
    find_session,
    finish_deletions,
    open_session,
    owners,
    traces,
    upload,
)
from sessions import Connection
from verbs import advance_to, claim, fail, job_row, lane_ready, set_clock, user_number, value

USER, OTHER = user_number(1), user_number(2)
DAY = 24 * 3600


def processed(admin: Connection, worker: Connection, user: UUID, content: str) -> UUID:
    """A document of the user that has rows in every table that has rows of documents."""
    document: UUID = upload(worker, user, content).document_id
    lease = next(job for job in claim(worker, 100) if job.document_id == document)
    used = {"usage_id": str(uuid4()), "job_id": str(lease.job_id), "provider": "p", "model": "m", "operation": "o"}
    worker.execute("select upload_pipeline.record_usage(%s)", [json.dumps([used])])
    advance_to(worker, lease, "parsed")
    fail(worker, lease, retryable=False)
    chunk = uuid4()
    for table, columns, given in (
        ("document_chunk_buffer", "", ""),
        ("document_chunks", ", embed_model, embedding, live", ", 'm3', '[1,0,0]', true"),
    ):
        admin.execute(
            f"""
            insert into upload_pipeline.{table}
              (document_id, ordinal, chunk_id, user_id, text, chunk_sha256, chunker, start_offset, end_offset,
               heading_path, section_ids{columns})
            values (%s, 0, %s, %s, 'word', repeat('a', 64), 'c', 0, 4, '{{}}', '{{}}'{given})
            """,
            [document, chunk, user],
        )
    admin.execute(
        "insert into upload_pipeline.document_outline values (%s, %s, %s, 'document', '', 0, 0, null)",
        [uuid4(), document, user],
    )
    admin.execute(
        "insert into upload_pipeline.policies values (%s, %s, 'insurer', 'product', '2026-01-01')", [document, user]
    )
    return document


def test_a_claim_moves_every_row_and_changes_no_id(admin: Connection, worker: Connection, session: Any) -> None:
    admin.execute("select upload_pipeline.register_model('m3', 'test', 3)")
    document = processed(admin, worker, session.user_id, "a")
    waiting = upload(worker, session.user_id, "b")
    had = traces(admin, session.user_id)
    assert {"documents", "upload_jobs", "job_outcomes", "events", "document_chunks", "document_outline"} <= had.keys()
    claimed = claim_session(worker, "t", USER)
    assert set(claimed.documents) == {document, waiting.document_id}
    assert (claimed.duplicates, claimed.existing_documents, claimed.remaining) == ([], [], 0)
    # the empty lane stays until the session is cleaned
    assert traces(admin, session.user_id) == {"sessions": 1, "lanes": 1}
    now = traces(admin, USER)
    assert now == {name: count for name, count in had.items() if name != "sessions"}
    key = value(admin, "select raw_key from upload_pipeline.documents where document_id = %s", document)
    assert key == f"raw/{session.user_id}/{document}"
    assert find_session(worker, "t") is None


def test_jobs_that_wait_are_ready_for_the_user_and_no_longer_for_the_session(
    admin: Connection, worker: Connection, session: Any
) -> None:
    ready, later = (upload(worker, session.user_id, content).job_id for content in "ab")
    admin.execute(
        "update upload_pipeline.upload_jobs set state = 'retryable', run_at = now() where job_id = %s", [later]
    )
    worker.execute("listen upload_pipeline_jobs")
    claim_session(worker, "t", USER)
    assert [notice.payload for notice in worker.notifies(timeout=0.5)] == ["default"]
    assert lane_ready(admin, USER)
    (lease,) = claim(worker, 10)
    assert (lease.job_id, lease.user_id) == (ready, USER)
    assert not lane_ready(admin, session.user_id)
    assert value(worker, "select upload_pipeline.promote_due()") == 1
    assert [job.job_id for job in claim(worker, 10)] == [later]


def test_a_job_at_work_goes_on_and_ends_as_the_users(admin: Connection, worker: Connection, session: Any) -> None:
    for content in "abc":
        upload(worker, USER, content)
    job = upload(worker, session.user_id, "x").job_id
    (lease,) = [lease for lease in claim(worker, 2) if lease.job_id == job]
    claim_session(worker, "t", USER)
    # one of the user's own and the one that came are two, the cap
    assert claim(worker, 10) == []
    advance_to(worker, lease, "embedded")
    assert (job_row(admin, job).state, job_row(admin, job).user_id) == ("done", USER)
    assert len(claim(worker, 10)) == 1
    assert value(admin, "select count(*) from upload_pipeline.events where user_id = %s", session.user_id) == 0


def test_bytes_that_the_user_has_are_not_had_twice(admin: Connection, worker: Connection, session: Any) -> None:
    own = upload(worker, USER, "same")
    twin, alone = upload(worker, session.user_id, "same"), upload(worker, session.user_id, "alone")
    (lease,) = [lease for lease in claim(worker, 10) if lease.job_id == twin.job_id]
    claimed = claim_session(worker, "t", USER)
    assert claimed.documents == [alone.document_id]
    assert dict(zip(claimed.duplicates, claimed.existing_documents, strict=True)) == {twin.document_id: own.document_id}
    assert owners(admin) == {own.document_id: USER, alone.document_id: USER}
    with pytest.raises(psycopg.DatabaseError) as caught:
        advance_to(worker, lease, "parsed")
    assert caught.value.sqlstate == "UP001"
    assert finish_deletions(worker) == 1
    assert claim_session(worker, "t", USER) == claimed


def test_batches_move_and_count_the_users_own_document_for_one_that_was_given_up(
    admin: Connection, worker: Connection, session: Any
) -> None:
    own = upload(worker, USER, "same")
    batch = uuid4()
    members = [file_member(session.user_id, 0, b"same"), file_member(session.user_id, 1, b"alone"), refused_member(2)]
    twin, alone, _ = make_batch(worker, session.user_id, members, batch)
    claimed = claim_session(worker, "t", USER)
    assert (claimed.documents, claimed.duplicates) == ([alone.document_id], [twin.document_id])
    finish_deletions(worker)
    assert claim_session(worker, "t", USER) == claimed
    rows = admin.execute("select * from upload_pipeline.batch_members order by ordinal").fetchall()
    assert [(row.user_id, row.document_id, row.job_id, row.duplicate) for row in rows] == [
        (USER, own.document_id, own.job_id, True),
        (USER, alone.document_id, alone.job_id, False),
        (USER, None, None, False),
    ]
    assert overview(worker, batch).user_id == USER
    assert traces(admin, session.user_id) == {"sessions": 1, "lanes": 1}


def test_asked_again_it_answers_the_same_and_what_came_late_follows(
    admin: Connection, worker: Connection, session: Any
) -> None:
    early = upload(worker, session.user_id, "early")
    first = claim_session(worker, "t", USER)
    assert claim_session(worker, "t", USER) == first
    late = upload(worker, session.user_id, "late")
    again = claim_session(worker, "t", USER)
    assert set(again.documents) == {early.document_id, late.document_id}
    assert set(owners(admin).values()) == {USER}
    value(worker, "select count(*) from upload_pipeline.begin_deletion(%s)", early.document_id)
    finish_deletions(worker)
    assert claim_session(worker, "t", USER) == again


def test_what_is_not_to_be_claimed(worker: Connection) -> None:
    set_clock(worker)
    for token in ("claimed", "ended", "expired"):
        open_session(worker, token)
    claim_session(worker, "claimed", USER)
    end_session(worker, "ended")
    set_clock(worker, 30 * DAY)
    for token, state in (("claimed", "UP003"), ("ended", "UP002"), ("expired", "UP002"), ("unknown", "UP002")):
        with pytest.raises(psycopg.DatabaseError) as caught:
            claim_session(worker, token, OTHER)
        assert caught.value.sqlstate == state, token
    assert claim_session(worker, "claimed", USER).documents == []


def test_a_document_stays_while_the_users_own_is_being_deleted(
    admin: Connection, worker: Connection, session: Any
) -> None:
    own = upload(worker, USER, "same")
    theirs = upload(worker, session.user_id, "same")
    worker.execute("select upload_pipeline.begin_deletion(%s)", [own.document_id])
    claimed = claim_session(worker, "t", USER)
    assert (claimed.documents, claimed.duplicates, claimed.remaining) == ([], [], 1)
    finish_deletions(worker)
    claimed = claim_session(worker, "t", USER)
    assert (claimed.documents, claimed.remaining) == ([theirs.document_id], 0)
    assert owners(admin) == {theirs.document_id: USER}


def test_bytes_that_are_there_do_not_give_way_to_bytes_that_are_awaited(
    admin: Connection, worker: Connection, session: Any
) -> None:
    announced = upload(worker, USER, "same")
    admin.execute(
        "update upload_pipeline.documents set upload_deadline = now() where document_id = %s", [announced.document_id]
    )
    theirs = upload(worker, session.user_id, "same")
    assert claim_session(worker, "t", USER).remaining == 1
    lease = next(lease for lease in claim(worker, 10) if lease.job_id == announced.job_id)
    fail(worker, lease, retryable=False, code="UPLOAD_EXPIRED")
    claimed = claim_session(worker, "t", USER)
    assert (claimed.documents, claimed.remaining) == ([theirs.document_id], 0)
    assert owners(admin) == {theirs.document_id: USER}


def test_a_document_that_awaits_its_bytes_moves_with_its_deadline(
    admin: Connection, worker: Connection, session: Any
) -> None:
    document = upload(worker, session.user_id, "a").document_id
    admin.execute("update upload_pipeline.documents set upload_deadline = '2100-01-01'")
    assert claim_session(worker, "t", USER).documents == [document]
    row = admin.execute(
        "select user_id, upload_deadline::date::text, raw_key from upload_pipeline.documents"
    ).fetchone()
    assert row == (USER, "2100-01-01", f"raw/{session.user_id}/{document}")


def test_documents_under_deletion_do_not_move(admin: Connection, worker: Connection, session: Any) -> None:
    document = upload(worker, session.user_id, "a").document_id
    worker.execute("select upload_pipeline.begin_deletion(%s)", [document])
    assert claim_session(worker, "t", USER).documents == []
    assert finish_deletions(worker) == 1


def test_what_was_taken_of_buckets_is_poured_into_others_once(worker: Connection) -> None:
    def take(name: str, count: int) -> Any:
        for _ in range(count):
            row = worker.execute(
                "select * from upload_pipeline.take_tokens(%s, '{10}', '{1 day}')", [[name]]
            ).fetchone()
        return row

    set_clock(worker)
    take("session", 3)
    take("user", 2)
    pour = "select upload_pipeline.pour_buckets(%s, %s, %s::interval[])"
    for _ in range(2):
        worker.execute(pour, [["session", "full"], ["user", "other"], ["1 day", "1 day"]])
    assert take("user", 1).remaining == 10 - 3 - 2 - 1
    assert take("session", 1).remaining == 9
    assert take("other", 1).remaining == 9
    take("session", 8)
    worker.execute(pour, [["session"], ["user"], ["1 day"]])
    refused = take("user", 1)
    assert (refused.allowed, refused.remaining) == (False, 0)
