"""Sessions: opened, kept alive, ended, claimed by a user with all that hangs on them, and cleaned."""

from __future__ import annotations

import json
import random
import threading
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from batch_members import file_member, make_batch, overview, refused_member
from session_verbs import (
    claim_session,
    clean_sessions,
    digest,
    end_session,
    find_session,
    finish_deletions,
    open_session,
    owners,
    traces,
    upload,
)
from sessions import Connect, Connection
from verbs import (
    STAGES,
    advance_many,
    advance_to,
    await_lock_wait,
    claim,
    claim_one,
    fail,
    in_background,
    job_row,
    lane_ready,
    set_clock,
    terminate,
    user_number,
    value,
)

USER, OTHER = user_number(1), user_number(2)
HOUR, DAY = 3600, 24 * 3600


@pytest.fixture
def session(worker: Connection) -> Any:
    """A session whose token is `t`."""
    return open_session(worker, "t")


def version(admin: Connection) -> tuple[Any, ...]:
    return tuple(admin.execute("select xmin::text, expires_at from upload_pipeline.sessions").fetchone() or ())


def test_two_sessions_are_two_users_whose_tokens_are_kept_as_hashes(admin: Connection, worker: Connection) -> None:
    first, second = open_session(worker, "one"), open_session(worker, "two")
    assert first.user_id != second.user_id
    assert find_session(worker, "one").user_id == first.user_id
    assert find_session(worker, "two").session_id == second.session_id
    assert find_session(worker, digest("one")) is None
    with pytest.raises(psycopg.errors.UniqueViolation):
        open_session(worker, "one")
    columns = {column.name for column in admin.execute("select * from upload_pipeline.sessions").description or ()}
    assert columns == {
        *("session_id", "user_id", "token_sha256", "created_at", "last_seen_at", "expires_at"),
        *("claimed_by", "claimed_at", "ended_at"),
    }


def test_use_moves_the_end_and_writes_at_most_once_an_hour(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    opened = open_session(worker, "t")
    before = version(admin)
    for seconds in (1, HOUR):
        set_clock(worker, seconds)
        found = find_session(worker, "t")
        assert (found.slid, found.expires_at) == (False, opened.expires_at)
    assert version(admin) == before
    set_clock(worker, HOUR + 1)
    found = find_session(worker, "t")
    assert found.slid
    assert (found.expires_at - opened.expires_at).total_seconds() == HOUR + 1
    after = version(admin)
    assert not find_session(worker, "t").slid
    assert version(admin) == after
    # a life of minutes slides within it
    open_session(worker, "short", "24 minutes")
    set_clock(worker, HOUR + 62)
    assert find_session(worker, "short", "24 minutes").slid


def test_a_session_is_over_when_its_time_is_and_when_it_is_ended(worker: Connection) -> None:
    set_clock(worker)
    for token in ("left alone", "ended", "used"):
        open_session(worker, token)
    assert end_session(worker, "ended")
    assert find_session(worker, "ended") is None
    assert not end_session(worker, "ended")
    assert not end_session(worker, "never was")
    set_clock(worker, 29 * DAY)
    assert find_session(worker, "used").slid
    set_clock(worker, 30 * DAY)
    assert find_session(worker, "left alone") is None
    assert not end_session(worker, "left alone")
    assert find_session(worker, "used") is not None


def test_requests_at_once_slide_a_session_once_and_wait_for_nothing(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    set_clock(worker)
    open_session(worker, "t")
    other = connect()
    for db in (worker, other):
        set_clock(db, 2 * HOUR)
    with worker.transaction():
        assert find_session(worker, "t").slid
        other.execute("set lock_timeout = '1 s'")
        assert not find_session(other, "t").slid
    assert not find_session(other, "t").slid


def processed(admin: Connection, worker: Connection, user: UUID, content: str) -> UUID:
    """A document of the user that has rows in every table that has rows of documents."""
    document: UUID = upload(worker, user, content).document_id
    lease = next(job for job in claim(worker, 100) if job.document_id == document)
    used = {"usage_id": str(uuid4()), "job_id": str(lease.job_id), "provider": "p", "model": "m", "operation": "o"}
    worker.execute("select upload_pipeline.record_usage(%s)", [json.dumps([used])])
    advance_to(worker, lease, "parsed")
    fail(worker, lease, retryable=False)
    chunk, node = uuid4(), uuid4()
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
    for one in (node, chunk):
        admin.execute(
            "insert into upload_pipeline.document_nodes values (%s, %s, %s, 'section', '', 0, 0)", [one, document, user]
        )
    admin.execute(
        "insert into upload_pipeline.document_edges values (%s, %s, 'next', %s, %s)", [node, chunk, document, user]
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
    assert {"documents", "upload_jobs", "job_outcomes", "events", "document_chunks", "document_nodes"} <= had.keys()
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


def test_what_is_over_is_cleaned_after_its_grace_and_a_record_stays(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    sessions = {token: open_session(worker, token) for token in ("ended", "expired", "alive")}
    done, failed, waiting = (
        upload(worker, sessions["ended"].user_id, content, f"{content}.txt")
        for content in ("done", "failed", "waiting")
    )
    kept = upload(worker, sessions["alive"].user_id, "kept")
    make_batch(worker, sessions["ended"].user_id, [refused_member(0)])
    admin.execute("update upload_pipeline.lanes set max_in_flight = 10")
    leases = {lease.job_id: lease for lease in claim(worker, 10)}
    used = {"usage_id": str(uuid4()), "job_id": str(done.job_id), "provider": "p", "model": "m", "operation": "o"}
    worker.execute("select upload_pipeline.record_usage(%s)", [json.dumps([used])])
    advance_to(worker, leases[done.job_id], "embedded")
    fail(worker, leases[failed.job_id], retryable=False, code="ENCRYPTED")
    end_session(worker, "ended")
    set_clock(worker, DAY)
    assert clean_sessions(worker) == (0, 0)
    set_clock(worker, DAY + 1)
    assert clean_sessions(worker) == (0, 3)
    assert clean_sessions(worker) == (0, 0)
    assert owners(admin) == {kept.document_id: sessions["alive"].user_id}
    assert finish_deletions(worker) == 3
    assert clean_sessions(worker) == (1, 0)
    assert value(admin, "select array_agg(user_id) from upload_pipeline.usage_records") == [None]
    records = {
        row.filename: row for row in worker.execute("select * from upload_pipeline.processing_records").fetchall()
    }
    assert {name: (row.status, row.error_code) for name, row in records.items()} == {
        "done.txt": ("completed", None),
        "failed.txt": ("failed", "ENCRYPTED"),
        "waiting.txt": ("failed", "CANCELLED"),
    }
    for row in records.values():
        assert (row.session_id, row.file_bytes, row.media_type) == (None, 10, "text/plain")
        assert row.uploaded_at <= row.completed_at
    assert traces(admin, sessions["ended"].user_id) == {}
    assert value(admin, "select count(*) from upload_pipeline.sessions") == 2
    events = admin.execute(
        "select user_id, correlation_id from upload_pipeline.events where document_id = %s", [waiting.document_id]
    ).fetchall()
    assert len(events) > 3
    assert {tuple(event) for event in events} == {(None, "")}
    set_clock(worker, 29 * DAY)
    assert find_session(worker, "alive").slid
    set_clock(worker, 31 * DAY + 1)
    assert clean_sessions(worker) == (1, 0)
    assert [row.token_sha256 for row in admin.execute("select token_sha256 from upload_pipeline.sessions")] == [
        digest("alive")
    ]


def test_what_came_late_to_a_claimed_session_follows_by_itself(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    session = open_session(worker, "t")
    claim_session(worker, "t", USER)
    late = upload(worker, session.user_id, "late")
    assert clean_sessions(worker) == (0, 0)
    assert owners(admin) == {late.document_id: USER}
    assert claim_session(worker, "t", USER).documents == [late.document_id]
    set_clock(worker, DAY + 1)
    assert clean_sessions(worker) == (1, 0)
    assert value(admin, "select count(*) from upload_pipeline.processing_records") == 0
    assert traces(admin, session.user_id) == {}


def test_rounds_beside_each_other_clean_a_session_once(admin: Connection, worker: Connection, connect: Connect) -> None:
    for db in (worker, other := connect()):
        set_clock(db, -40 * DAY)
    session = open_session(worker, "t")
    upload(worker, session.user_id, "a")
    for db in (worker, other):
        set_clock(db)
    with worker.transaction():
        assert clean_sessions(worker) == (0, 1)
        other.execute("set lock_timeout = '1 s'")
        assert clean_sessions(other) == (0, 0)
    finish_deletions(worker)
    assert clean_sessions(other) == (1, 0)
    assert value(admin, "select count(*) from upload_pipeline.processing_records") == 1


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
