"""The verbs of uploads whose bytes come after their announcement: repeated, at once, cut off, and out of order."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4, uuid5

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    EPOCH,
    advance,
    await_lock_wait,
    cancel,
    claim_one,
    event_codes,
    fail,
    in_background,
    job_row,
    job_rows,
    lane_ready,
    promote,
    reap,
    release,
    retry,
    set_clock,
    snooze,
    terminate,
    value,
)

DIGEST = sha256(b"bytes").hexdigest()


def reserve(db: Connection, user: UUID, filename: str = "paper.md", window: str = "20 minutes", **more: Any) -> Any:
    """The one row that `reserve_document` answers."""
    document = uuid5(user, DIGEST)
    return db.execute(
        """
        select * from upload_pipeline.reserve_document(
          %s, %s, %s, 'text/plain', 5, %s, %s, %s, '{"a": 1}', %s::smallint, %s)
        """,
        [document, user, filename, DIGEST, f"raw/{document}", window, more.get("priority", 0), more.get("by", "c")],
    ).fetchone()


def accept(db: Connection, user: UUID, key: str | None = None) -> Any:
    document = uuid5(user, DIGEST)
    return db.execute(
        "select * from upload_pipeline.accept_document(%s, %s, 'whole.md', 'text/markdown', 5, %s, %s)",
        [document, user, DIGEST, key or f"raw/{document}"],
    ).fetchone()


def confirm(db: Connection, document: UUID, created_at: Any = EPOCH) -> bool:
    return bool(
        value(db, "select upload_pipeline.confirm_upload(%s, %s, 'text/html', 6)", document, created_at or EPOCH)
    )


def announce(db: Connection, document: UUID) -> bool:
    return bool(value(db, "select upload_pipeline.announce_upload(%s)", document))


def commit(db: Connection, lease: Any, keep: bool = True) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_validation(%s, %s, 'text/html', %s)",
        [lease.job_id, lease.lease_token, keep],
    ).fetchone()


def document_row(db: Connection) -> Any:
    return db.execute("select * from upload_pipeline.documents").fetchone()


def everything(db: Connection) -> Any:
    return (
        db.execute("select * from upload_pipeline.documents order by document_id").fetchall(),
        job_rows(db),
        db.execute("select * from upload_pipeline.job_outcomes").fetchall(),
        value(db, "select count(*) from upload_pipeline.events"),
    )


@pytest.fixture
def user() -> UUID:
    return uuid4()


@pytest.fixture
def reserved(worker: Connection, user: UUID) -> Any:
    """A document announced at second 0."""
    set_clock(worker)
    return reserve(worker, user)


def expire(db: Connection) -> None:
    fail(db, claim_one(db), retryable=False, code="UPLOAD_EXPIRED")


# reserve_document


def test_an_announcement_makes_document_job_and_events(worker: Connection, user: UUID, reserved: Any) -> None:
    assert (reserved.duplicate, reserved.raw_key) == (False, f"raw/{reserved.document_id}")
    assert reserved.upload_deadline == EPOCH + timedelta(minutes=20)
    document, job = document_row(worker), job_row(worker, reserved.job_id)
    assert (document.upload_deadline, document.created_at, document.updated_at) == (
        reserved.upload_deadline,
        EPOCH,
        EPOCH,
    )
    assert (job.stage, job.state, job.correlation_id) == ("queued", "queued", "c")
    assert lane_ready(worker, user)
    codes = worker.execute("select code from upload_pipeline.events order by event_id").fetchall()
    assert [row.code for row in codes] == ["document_reserved", "job_enqueued"]


def test_announced_bytes_are_no_duplicate_until_they_have_come(worker: Connection, user: UUID, reserved: Any) -> None:
    find = "select * from upload_pipeline.find_duplicate(%s, %s)"
    assert worker.execute(find, [user, DIGEST]).fetchone() is None
    assert confirm(worker, reserved.document_id)
    found = worker.execute(find, [user, DIGEST]).fetchone()
    assert found is not None
    assert (found.document_id, found.job_id, found.duplicate) == (reserved.document_id, reserved.job_id, True)
    again = reserve(worker, user, "other.md")
    assert (again.job_id, again.duplicate, again.upload_deadline) == (reserved.job_id, True, None)
    assert document_row(worker).filename == "paper.md"


def test_a_newer_announcement_takes_the_older_ones_place(worker: Connection, user: UUID, reserved: Any) -> None:
    set_clock(worker, 600)
    again = reserve(worker, user, "new.md", "1 hour", priority=4, by="d")
    assert (again.document_id, again.job_id, again.duplicate) == (reserved.document_id, reserved.job_id, False)
    document, job = document_row(worker), job_row(worker, reserved.job_id)
    assert (document.filename, document.created_at) == ("new.md", EPOCH)
    assert document.upload_deadline == again.upload_deadline == EPOCH + timedelta(seconds=600 + 3600)
    assert document.updated_at == EPOCH + timedelta(seconds=600)
    assert (job.priority, job.correlation_id, job.state) == (4, "d", "queued")


@pytest.mark.parametrize("window", ["0 seconds", "-1 hour", None])
def test_a_window_that_is_none_is_refused(worker: Connection, user: UUID, window: Any) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_window"):
        reserve(worker, user, window=window)
    assert document_row(worker) is None


def test_announcements_at_once_wait_for_each_other(
    admin: Connection, worker: Connection, connect: Connect, user: UUID
) -> None:
    other = connect()
    worker.execute("begin")
    first = reserve(worker, user)
    second = in_background(reserve, other, user)
    await_lock_wait(admin, other)
    worker.execute("commit")
    answer = second.result(timeout=10)
    assert (answer.document_id, answer.job_id) == (first.document_id, first.job_id)
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs") == 1


def test_an_announcement_that_meets_a_deletion_under_way_is_made_anew(
    admin: Connection, worker: Connection, connect: Connect, user: UUID, reserved: Any
) -> None:
    other = connect()
    worker.execute("select upload_pipeline.begin_deletion(%s)", [reserved.document_id])
    with pytest.raises(psycopg.Error, match="being deleted") as error:
        reserve(other, user)
    assert error.value.sqlstate == "UP003"
    worker.execute("begin")
    worker.execute("select upload_pipeline.finish_deletion(%s)", [reserved.document_id])
    again = in_background(reserve, other, user)
    await_lock_wait(admin, other)
    worker.execute("commit")
    answer = again.result(timeout=10)
    assert answer.document_id == reserved.document_id
    assert answer.job_id != reserved.job_id


@pytest.mark.parametrize("state", ["cancelled", "deadletter", "stopping"])
def test_an_announcement_starts_a_job_again_that_will_not_go_on(
    worker: Connection, user: UUID, reserved: Any, state: str
) -> None:
    lease = None
    if state == "deadletter":
        expire(worker)
    elif state == "stopping":
        lease = claim_one(worker)
        cancel(worker, reserved.job_id)
    else:
        cancel(worker, reserved.job_id)
    again = reserve(worker, user)
    job = job_row(worker, again.job_id)
    assert again.job_id == reserved.job_id
    assert (job.stage, job.state, job.cancel_requested, job.finished_at) == ("queued", "queued", False, None)
    assert value(worker, "select count(*) from upload_pipeline.job_outcomes") == 0
    if lease is not None:
        assert release(worker, [lease]) == {}  # fenced off


def test_an_announcement_of_a_document_whose_jobs_are_gone_makes_one(
    admin: Connection, worker: Connection, user: UUID, reserved: Any
) -> None:
    admin.execute("delete from upload_pipeline.upload_jobs")
    again = reserve(worker, user)
    assert job_row(worker, again.job_id).state == "queued"


# What is said of a job that waits, works or has ended.

SAY = {
    "reserve": lambda db, reserved, user: reserve(db, user),
    "announce": lambda db, reserved, user: announce(db, reserved.document_id),
    "confirm": lambda db, reserved, user: confirm(db, reserved.document_id),
    "accept": lambda db, reserved, user: accept(db, user),
}


@pytest.mark.parametrize("word", SAY)
def test_a_job_that_sleeps_is_ready_now(worker: Connection, user: UUID, reserved: Any, word: str) -> None:
    snooze(worker, claim_one(worker), "1 hour")
    set_clock(worker, 10)
    assert SAY[word](worker, reserved, user)
    assert job_row(worker, reserved.job_id).state == "queued"
    assert lane_ready(worker, user)
    assert event_codes(worker, reserved.job_id)[-1] == "job_promoted"


@pytest.mark.parametrize("word", SAY)
def test_a_job_at_work_does_not_sleep_on_what_is_outdated(
    worker: Connection, user: UUID, reserved: Any, word: str
) -> None:
    lease = claim_one(worker)
    assert SAY[word](worker, reserved, user)
    assert job_row(worker, reserved.job_id).state == "working"
    assert snooze(worker, lease, "1 hour") == EPOCH
    assert promote(worker) == 1
    # once: the next look is a look of its own
    assert snooze(worker, claim_one(worker), "1 hour") == EPOCH + timedelta(hours=1)


@pytest.mark.parametrize("retryable", [True, False])
@pytest.mark.parametrize("word", SAY)
def test_a_job_at_work_does_not_fail_of_what_is_outdated(
    worker: Connection, user: UUID, reserved: Any, word: str, retryable: bool
) -> None:
    lease = claim_one(worker)
    assert SAY[word](worker, reserved, user)
    answer = fail(worker, lease, retryable=retryable)
    assert (answer.state, answer.retry_count, answer.run_at) == ("retryable", 0, EPOCH)
    assert fail(worker, lease, retryable=retryable) == answer  # told again
    assert value(worker, "select count(*) from upload_pipeline.job_outcomes") == 0
    assert promote(worker) == 1
    assert fail(worker, claim_one(worker), retryable=False).state == "deadletter"


def test_a_job_that_is_to_stop_stops_though_its_bytes_have_come(worker: Connection, reserved: Any) -> None:
    lease = claim_one(worker)
    cancel(worker, reserved.job_id)
    confirm(worker, reserved.document_id)
    assert fail(worker, lease).state == "cancelled"


def test_a_job_whose_worker_is_gone_is_tried_again_though_it_was_woken(worker: Connection, reserved: Any) -> None:
    claim_one(worker)
    confirm(worker, reserved.document_id)
    set_clock(worker, 3600)
    assert reap(worker) == 1
    assert (job_row(worker, reserved.job_id).state, job_row(worker, reserved.job_id).retry_count) == ("retryable", 1)


def test_what_is_said_before_a_step_does_not_hide_a_failure_of_a_later_one(worker: Connection, reserved: Any) -> None:
    lease = claim_one(worker)
    confirm(worker, reserved.document_id)
    set_clock(worker, 1)
    assert advance(worker, lease, "queued", "job_validated")
    assert fail(worker, lease, retryable=False).state == "deadletter"


@pytest.mark.parametrize(("word", "state"), [("announce", "queued"), ("confirm", "queued"), ("accept", "queued")])
def test_late_bytes_start_a_job_again_that_had_given_up(
    worker: Connection, user: UUID, reserved: Any, word: str, state: str
) -> None:
    expire(worker)
    assert SAY[word](worker, reserved, user)
    assert job_row(worker, reserved.job_id).state == state


def test_a_cancelled_job_stays_so_when_bytes_come_and_starts_when_its_user_comes(
    worker: Connection, user: UUID, reserved: Any
) -> None:
    cancel(worker, reserved.job_id)
    assert announce(worker, reserved.document_id)
    assert job_row(worker, reserved.job_id).state == "cancelled"
    assert not accept(worker, user).duplicate
    assert job_row(worker, reserved.job_id).state == "queued"


# confirm_upload


def test_a_confirmation_ends_the_wait_once(worker: Connection, reserved: Any) -> None:
    assert confirm(worker, reserved.document_id)
    document = document_row(worker)
    assert (document.upload_deadline, document.media_type, document.file_bytes) == (None, "text/html", 6)
    before = everything(worker)
    assert confirm(worker, reserved.document_id)
    assert announce(worker, reserved.document_id)
    assert everything(worker) == before
    codes = worker.execute("select code from upload_pipeline.events where job_id is null order by event_id").fetchall()
    assert [row.code for row in codes] == ["document_reserved", "document_accepted"]


def test_a_confirmation_of_what_is_not_there_changes_nothing(worker: Connection, user: UUID, reserved: Any) -> None:
    before = everything(worker)
    assert not confirm(worker, uuid4())
    assert not confirm(worker, reserved.document_id, EPOCH + timedelta(seconds=1))  # of one that was made anew
    assert not announce(worker, uuid4())
    assert everything(worker) == before
    worker.execute("select upload_pipeline.begin_deletion(%s)", [reserved.document_id])
    before = everything(worker)
    assert not confirm(worker, reserved.document_id)
    assert not announce(worker, reserved.document_id)
    assert everything(worker) == before


@pytest.mark.parametrize("deletion", ["begin_deletion", "finish_deletion"])
@pytest.mark.parametrize("word", ["reserve", "announce", "confirm", "accept"])
def test_a_deletion_and_a_word_at_once_take_turns(
    admin: Connection, worker: Connection, connect: Connect, user: UUID, reserved: Any, deletion: str, word: str
) -> None:
    """Whoever comes second sees what the first did; neither is undone for a deadlock."""
    if deletion == "finish_deletion":
        worker.execute("select upload_pipeline.begin_deletion(%s)", [reserved.document_id])
    other = connect()
    set_clock(other)
    worker.execute("begin")
    worker.execute(f"select upload_pipeline.{deletion}(%s)", [reserved.document_id])
    second = in_background(SAY[word], other, reserved, user)
    await_lock_wait(admin, other)
    worker.execute("commit")
    try:
        answer = second.result(timeout=10)
    except psycopg.Error as error:
        assert error.sqlstate == "UP003"  # noqa: PT017 - one of the answers that there may be
    else:
        assert (answer is False) is (word in ("announce", "confirm"))
        if word in ("reserve", "accept"):
            assert answer.job_id != reserved.job_id


# accept_document on what is awaited


def test_whole_bytes_fulfil_an_announcement_and_are_no_duplicate(worker: Connection, user: UUID, reserved: Any) -> None:
    first, second = accept(worker, user), accept(worker, user)
    assert (first.document_id, first.job_id, first.duplicate) == (reserved.document_id, reserved.job_id, False)
    assert (second.job_id, second.duplicate) == (reserved.job_id, True)
    document = document_row(worker)
    assert (document.filename, document.media_type, document.upload_deadline) == ("whole.md", "text/markdown", None)


def test_whole_bytes_at_another_place_than_the_awaited_ones_are_refused(
    worker: Connection, user: UUID, reserved: Any
) -> None:
    before = everything(worker)
    with pytest.raises(psycopg.Error, match="another place") as error:
        accept(worker, user, "raw/elsewhere")
    assert error.value.sqlstate == "UP003"
    assert everything(worker) == before


# commit_validation


def test_the_job_that_finds_the_bytes_ends_the_wait(worker: Connection, reserved: Any) -> None:
    moved = commit(worker, claim_one(worker))
    assert (moved.stage, moved.state) == ("job_validated", "working")
    document = document_row(worker)
    assert (document.upload_deadline, document.media_type) == (None, "text/html")
    assert value(worker, "select count(*) from upload_pipeline.events where code = 'document_accepted'") == 1


@pytest.mark.parametrize("keep", [True, False])
def test_a_validation_whose_answer_was_lost_answers_the_same_again(
    worker: Connection, reserved: Any, keep: bool
) -> None:
    lease = claim_one(worker)
    first = commit(worker, lease, keep)
    before = everything(worker)
    assert commit(worker, lease, keep) == first
    assert everything(worker) == before


def test_a_validation_of_bytes_that_came_another_way_meanwhile_changes_no_fact(
    worker: Connection, user: UUID, reserved: Any
) -> None:
    lease = claim_one(worker)
    accept(worker, user)
    commit(worker, lease)
    assert document_row(worker).media_type == "text/markdown"
    assert value(worker, "select count(*) from upload_pipeline.events where code = 'document_accepted'") == 1


def test_a_validation_with_a_stale_token_or_at_another_stage_changes_nothing(worker: Connection, reserved: Any) -> None:
    stale = claim_one(worker)
    retry(worker, reserved.job_id, force=True)
    lease = claim_one(worker)
    before = everything(worker)
    with pytest.raises(psycopg.Error) as error:
        commit(worker, stale)
    assert error.value.sqlstate == "UP001"
    assert everything(worker) == before
    advance(worker, lease, "queued", "job_validated")
    advance(worker, lease, "job_validated", "parsing")
    before = everything(worker)
    with pytest.raises(psycopg.Error) as error:
        commit(worker, lease)
    assert error.value.sqlstate == "UP004"
    assert everything(worker) == before


# cut off


@pytest.mark.parametrize("word", [*SAY, "commit"])
def test_a_word_cut_off_before_its_commit_changes_nothing_and_can_be_said_again(
    admin: Connection, worker: Connection, connect: Connect, user: UUID, reserved: Any, word: str
) -> None:
    lease = claim_one(worker)
    if word != "commit":
        snooze(worker, lease)
    say = SAY.get(word) or (lambda db, reserved, user: commit(db, lease))
    before = everything(worker)
    victim = connect()
    set_clock(victim)
    victim.execute("begin")
    say(victim, reserved, user)
    terminate(admin, victim)
    assert everything(worker) == before
    assert say(worker, reserved, user)


@pytest.mark.parametrize("word", SAY)
def test_words_at_once_about_one_document_take_turns(
    admin: Connection, worker: Connection, connect: Connect, user: UUID, reserved: Any, word: str
) -> None:
    others = [connect() for _ in SAY]
    worker.execute("begin")
    SAY[word](worker, reserved, user)
    for other in others:
        set_clock(other)
    said = [in_background(SAY[name], other, reserved, user) for name, other in zip(SAY, others, strict=True)]
    for name, other in zip(SAY, others, strict=True):
        if not (name in ("reserve", "accept") and word in ("confirm", "accept")):
            await_lock_wait(admin, other)
    worker.execute("commit")
    for one in said:
        assert one.result(timeout=10)
    assert document_row(worker).upload_deadline is None
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs") == 1


def test_the_first_words_about_one_file_at_once_never_fail(worker: Connection, connect: Connect) -> None:
    """Each round meets a file that nobody knows yet: whoever is second anywhere finds what the first has made."""
    others = [connect() for _ in range(4)]
    for _ in range(40):
        user = uuid4()
        words = [
            in_background(say, db, user) for db, say in zip(others, (reserve, accept, reserve, accept), strict=True)
        ]
        assert len({word.result(timeout=10).job_id for word in words}) == 1
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs") == 40


@pytest.mark.parametrize("say", [reserve, accept])
def test_a_document_of_the_same_id_that_is_now_anothers_is_in_the_way(
    admin: Connection, worker: Connection, user: UUID, reserved: Any, say: Any
) -> None:
    admin.execute("update upload_pipeline.documents set user_id = %s", [uuid4()])
    before = everything(worker)
    with pytest.raises(psycopg.Error, match="another user") as error:
        say(worker, user)
    assert error.value.sqlstate == "UP003"
    assert everything(worker) == before
