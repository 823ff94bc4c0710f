"""Sessions: opened, kept alive, ended, and cleaned."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from batch_members import make_batch, refused_member
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
from verbs import advance_to, claim, fail, set_clock, user_number, value

USER = user_number(1)
HOUR, DAY = 3600, 24 * 3600


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
