"""A claim of a session, and what others do to it and its documents at the same moment."""

from __future__ import annotations

import json
import random
import threading
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from batch_members import file_member, make_batch
from session_verbs import claim_session, find_session, finish_deletions, open_session, owners, traces, upload
from sessions import Connect, Connection
from verbs import (
    STAGES,
    advance_many,
    advance_to,
    await_lock_wait,
    claim,
    claim_one,
    in_background,
    job_row,
    terminate,
    user_number,
    value,
)

USER, OTHER = user_number(1), user_number(2)


def test_of_two_users_at_once_one_has_the_session(
    admin: Connection, worker: Connection, connect: Connect, session: Any
) -> None:
    document = upload(worker, session.user_id, "a").document_id
    other = connect()
    with worker.transaction():
        claim_session(worker, "t", USER)
        losing = in_background(claim_session, other, "t", OTHER)
        await_lock_wait(admin, other)
    with pytest.raises(psycopg.DatabaseError, match="another user"):
        losing.result(10)
    assert owners(admin) == {document: USER}


def test_a_claim_that_is_cut_off_has_moved_nothing(
    admin: Connection, worker: Connection, connect: Connect, session: Any
) -> None:
    for content in "abc":
        upload(worker, session.user_id, content)
    had = traces(admin, session.user_id)
    victim = connect()
    victim.execute("begin")
    claim_session(victim, "t", USER)
    terminate(admin, victim)
    assert traces(admin, session.user_id) == had
    assert find_session(worker, "t") is not None
    assert len(claim_session(worker, "t", USER).documents) == 3


def test_a_claim_waits_for_a_step_that_is_being_written_and_takes_it_along(
    admin: Connection, worker: Connection, connect: Connect, session: Any
) -> None:
    job = upload(worker, session.user_id, "a").job_id
    lease = claim_one(worker)
    advance_to(worker, lease, "chunking")
    claiming = connect()
    chunk = {
        "ordinal": 0,
        "chunk_id": str(uuid4()),
        "text": "word",
        "chunk_sha256": "a" * 64,
        "chunker": "c",
        "start_offset": 0,
        "end_offset": 4,
        "heading_path": [],
        "section_ids": [],
    }
    with worker.transaction():
        worker.execute(
            "select upload_pipeline.buffer_chunks(%s, %s, %s::jsonb)",
            [lease.job_id, lease.lease_token, json.dumps([chunk])],
        )
        moving = in_background(claim_session, claiming, "t", USER)
        await_lock_wait(admin, claiming)
    assert len(moving.result(10).documents) == 1
    assert value(admin, "select user_id from upload_pipeline.document_chunk_buffer") == USER
    assert job_row(admin, job).stage == "chunks_buffered"


def test_a_file_that_the_user_uploads_meanwhile_is_a_duplicate_of_one_of_them(
    admin: Connection, worker: Connection, connect: Connect, session: Any
) -> None:
    upload(worker, session.user_id, "same")
    claiming = connect()
    with worker.transaction():
        own = upload(worker, USER, "same")
        moving = in_background(claim_session, claiming, "t", USER)
        await_lock_wait(admin, claiming)
    claimed = moving.result(10)
    assert claimed.existing_documents == [own.document_id]
    assert owners(admin) == {own.document_id: USER}


def test_a_file_whose_document_is_claimed_after_it_was_looked_up_is_refused(
    admin: Connection, worker: Connection, connect: Connect, session: Any
) -> None:
    document = upload(worker, session.user_id, "same").document_id
    late = connect()
    with worker.transaction():
        claim_session(worker, "t", USER)
        arriving = in_background(upload, late, session.user_id, "same")
        await_lock_wait(admin, late)
    with pytest.raises(psycopg.Error, match="belongs to another user") as refused:
        arriving.result(10)
    assert refused.value.sqlstate == "UP003"

    claimed = {**file_member(session.user_id, 0, b"same"), "document_id": str(document)}
    member, other = make_batch(worker, session.user_id, [claimed, file_member(session.user_id, 1, b"other")])
    assert (member.error_code, other.error_code) == ("INVALID_STATE", None)
    assert owners(admin) == {document: USER, other.document_id: session.user_id}


def test_sessions_with_the_same_files_are_claimed_by_one_user_at_once(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    contents = [str(number) for number in range(20)]
    for token in ("one", "two"):
        session = open_session(worker, token)
        for content in contents if token == "one" else reversed(contents):
            upload(worker, session.user_id, content)
    claims = [in_background(claim_session, connect(), token, USER) for token in ("one", "two")]
    answers = [claimed.result(30) for claimed in claims]
    assert sum(len(answer.documents) for answer in answers) == 20
    assert sum(len(answer.duplicates) for answer in answers) == 20
    assert set(owners(admin).values()) == {USER}


@pytest.mark.slow
def test_claims_among_busy_workers_lose_nothing_and_lock_nobody_out(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    """Workers lead jobs on in groups while their documents change hands and go; a deadlock would end a thread."""
    stop = threading.Event()
    tokens: list[str] = []

    def work(db: Connection, number: int) -> int:
        done = 0
        while not stop.is_set() or claimable():
            leases = claim(db, 4)
            place = {lease.job_id: STAGES.index(lease.stage) for lease in leases}
            fences = {lease.job_id: lease.lease_token for lease in leases}
            while place:
                asked = [
                    (job, fences[job], STAGES[here], STAGES[here + 1], True)
                    for job, here in random.Random(number + done).sample(sorted(place.items()), len(place))
                ]
                moved = advance_many(db, asked)
                place = {
                    job: here + 1 for job, here in place.items() if job in moved and STAGES[here + 1] != STAGES[-1]
                }
                done += len(moved)
        return done

    def claimable() -> bool:
        return bool(
            value(admin, "select count(*) from upload_pipeline.upload_jobs where state in ('queued', 'working')")
        )

    def visit(db: Connection, number: int) -> None:
        chance = random.Random(number)
        for _ in range(40):
            token = f"{number} {uuid4()}"
            session = open_session(db, token)
            for content in chance.sample("abcdefghij", 5):
                upload(db, session.user_id, content)
            tokens.append(token)
            for _ in range(2):
                claim_session(db, token, USER)
            unwanted = chance.choice([*owners(db), uuid4()])
            db.execute("select upload_pipeline.begin_deletion(%s)", [unwanted])
            finish_deletions(db)

    workers = [in_background(work, connect(), number) for number in range(3)]
    visitors = [in_background(visit, connect(), number) for number in range(3)]
    for visitor in visitors:
        visitor.result(120)
    stop.set()
    assert sum(busy.result(60) for busy in workers) >= 10
    for token in tokens:
        assert claim_session(worker, token, USER).remaining == 0
    assert set(owners(admin).values()) == {USER}
    stuck = "select count(*) from upload_pipeline.upload_jobs where state not in ('done', 'cancelled', 'queued')"
    assert value(admin, stuck) == 0
