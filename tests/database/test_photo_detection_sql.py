"""The verbs of detection: by the worker, by a callback whenever it comes, repeated, at once, and against each other."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from photo_verbs import PHOTO_STAGES, add_project, history, photo_row, reserve_photo
from sessions import Connect, Connection
from verbs import (
    advance,
    await_lock_wait,
    cancel,
    claim_one,
    event_codes,
    fail,
    in_background,
    job_row,
    job_rows,
    promote,
    reap,
    retry,
    set_clock,
    snooze,
    user_number,
    value,
)

USER = user_number(1)
FOUND = [{"type": "damage", "label": "dent", "confidence": 0.5, "box": None, "note": ""}]
OFF = "Detection is off."


@dataclass
class Detecting:
    """A photo whose job is leased at `detecting`."""

    photo: UUID
    job: UUID
    lease: Any


@pytest.fixture
def detecting(worker: Connection) -> Detecting:
    set_clock(worker)
    made = reserve_photo(worker, USER, add_project(worker, USER))
    lease = claim_one(worker)
    for here, there in itertools.pairwise(PHOTO_STAGES[: PHOTO_STAGES.index("detecting") + 1]):
        advance(worker, lease, here, there)
    return Detecting(made.photo_id, made.job_id, lease)


def commit(db: Connection, lease: Any, detector: str = "openai", detections: Any = FOUND) -> Any:
    told = None if detections is None else json.dumps(detections)
    return db.execute(
        "select * from upload_pipeline.commit_detections(%s, %s, %s, %s)",
        [lease.job_id, lease.lease_token, detector, told],
    ).fetchone()


def wait_for(
    db: Connection, lease: Any, delivery: UUID | None = None, attempt: int = 1, wait: str = "10 minutes"
) -> Any:
    return db.execute(
        "select * from upload_pipeline.await_detections(%s, %s, %s, %s, %s)",
        [lease.job_id, lease.lease_token, delivery or uuid4(), attempt, wait],
    ).fetchone()


def answer(db: Connection, photo: UUID, detections: Any = FOUND, error: str | None = None) -> bool:
    told = json.dumps(detections)
    digest = sha256(f"{told}{error}".encode()).hexdigest()
    return bool(
        value(
            db,
            "select upload_pipeline.answer_detections(%s, %s, %s, %s)",
            photo,
            None if error else told,
            error,
            digest,
        )
    )


def request(db: Connection, photo: UUID) -> Any:
    return db.execute("select * from upload_pipeline.photo_detection_requests where photo_id = %s", [photo]).fetchone()


def outcome(db: Connection, job: UUID) -> Any:
    return db.execute("select * from upload_pipeline.job_outcomes where job_id = %s", [job]).fetchone()


# by the worker


def test_what_was_found_and_the_end_of_the_job_are_one_write(worker: Connection, detecting: Detecting) -> None:
    ended = commit(worker, detecting.lease)
    assert (ended.stage, ended.state) == ("completed", "done")
    photo = photo_row(worker, detecting.photo)
    assert (photo.status, photo.detector, photo.detections, photo.warnings) == ("completed", "openai", FOUND, [])
    assert outcome(worker, detecting.job).results == {"detector": "openai", "detections": 1}
    assert history(worker, detecting.job)[-1] == "completed"


def test_asked_again_it_answers_the_same_and_writes_nothing(worker: Connection, detecting: Detecting) -> None:
    commit(worker, detecting.lease)
    events = event_codes(worker, detecting.job)
    assert commit(worker, detecting.lease, detections=[]).state == "done"
    assert photo_row(worker, detecting.photo).detections == FOUND
    assert event_codes(worker, detecting.job) == events


def test_a_worker_that_lost_its_lease_writes_nothing(worker: Connection, detecting: Detecting) -> None:
    set_clock(worker, 100)
    assert reap(worker) == 1
    for write in (commit, wait_for):
        with pytest.raises(psycopg.Error) as refused:
            write(worker, detecting.lease)
        assert refused.value.sqlstate == "UP001"
    assert photo_row(worker, detecting.photo).detections is None
    assert request(worker, detecting.photo) is None


def test_where_detection_is_off_the_photo_says_so_until_somebody_has_looked(
    admin: Connection, worker: Connection, detecting: Detecting
) -> None:
    admin.execute("update upload_pipeline.photos set warnings = '{It has no EXIF.}'")
    commit(worker, detecting.lease, "none", None)
    photo = photo_row(worker, detecting.photo)
    assert (photo.status, photo.detector, photo.detections) == ("completed", "none", None)
    assert photo.warnings == ["It has no EXIF.", OFF]
    assert outcome(worker, detecting.job).results == {"detector": "none", "detections": None}
    retry(worker, detecting.job, "detecting")
    commit(worker, claim_one(worker), "none", None)
    assert photo_row(worker, detecting.photo).warnings == ["It has no EXIF.", OFF]
    retry(worker, detecting.job, "detecting")
    commit(worker, claim_one(worker))
    assert photo_row(worker, detecting.photo).warnings == ["It has no EXIF."]


# by a callback


def live_as(db: Connection, detecting: Detecting, state: str) -> None:
    """Brings the job from `working` to another live state."""
    if state == "snoozed":
        wait_for(db, detecting.lease)
    elif state == "queued":
        wait_for(db, detecting.lease)
        set_clock(db, 601)
        assert promote(db) == 1
    elif state == "failed before":
        fail(db, detecting.lease)


@pytest.mark.parametrize("state", ["working", "snoozed", "queued", "failed before"])
@pytest.mark.parametrize("error", [None, "The photo is too dark."])
def test_an_answer_ends_the_job_whatever_it_is_doing(
    worker: Connection, detecting: Detecting, state: str, error: str | None
) -> None:
    live_as(worker, detecting, state)
    assert answer(worker, detecting.photo, error=error)
    job, photo = job_row(worker, detecting.job), photo_row(worker, detecting.photo)
    ended = outcome(worker, detecting.job)
    if error is None:
        assert (job.stage, job.state, photo.status, photo.detector) == ("completed", "done", "completed", "webhook")
        assert photo.detections == FOUND
        assert (ended.error_code, ended.results) == (None, {"detector": "webhook", "detections": 1})
    else:
        assert (job.stage, job.state, photo.status) == ("detecting", "deadletter", "failed")
        assert (ended.error_code, ended.error_message) == ("DETECT_FAILED", error)
        assert photo.detections is None
    assert (job.worker_id, job.lease_expires_at) == (None, None)
    assert job.finished_at is not None


@pytest.mark.parametrize("error", [None, "The photo is too dark."])
def test_the_same_answer_again_changes_nothing_and_another_is_refused(
    worker: Connection, detecting: Detecting, error: str | None
) -> None:
    wait_for(worker, detecting.lease)
    assert answer(worker, detecting.photo, error=error)
    before = (job_row(worker, detecting.job), photo_row(worker, detecting.photo), event_codes(worker, detecting.job))
    assert not answer(worker, detecting.photo, error=error)
    for other in ({"detections": []}, {"error": "Something else."}):
        with pytest.raises(psycopg.Error) as refused:
            answer(worker, detecting.photo, **other)
        assert refused.value.sqlstate == "UP003"
    assert before == (
        job_row(worker, detecting.job),
        photo_row(worker, detecting.photo),
        event_codes(worker, detecting.job),
    )


def test_a_worker_that_is_at_work_when_the_answer_comes_learns_it_and_writes_nothing(
    worker: Connection, detecting: Detecting
) -> None:
    assert answer(worker, detecting.photo)
    told = wait_for(worker, detecting.lease)
    assert (told.stage, told.state) == ("completed", "done")
    assert photo_row(worker, detecting.photo).detections == FOUND
    assert request(worker, detecting.photo).answered_at is not None
    with pytest.raises(psycopg.Error) as refused:
        commit(worker, detecting.lease, detections=[])
    assert refused.value.sqlstate == "UP001"
    assert "write_fenced" not in event_codes(worker, detecting.job)


def test_a_dead_letter_that_nobody_answered_is_ended_by_a_late_answer(worker: Connection, detecting: Detecting) -> None:
    wait_for(worker, detecting.lease)
    set_clock(worker, 601)
    promote(worker)
    fail(worker, claim_one(worker), retryable=False, code="DETECT_TIMEOUT")
    assert photo_row(worker, detecting.photo).status == "failed"
    assert answer(worker, detecting.photo)
    assert (job_row(worker, detecting.job).state, photo_row(worker, detecting.photo).status) == ("done", "completed")
    assert outcome(worker, detecting.job).error_code is None
    assert not answer(worker, detecting.photo)


def test_a_job_that_is_not_at_detection_or_was_cancelled_takes_no_answer(
    worker: Connection, detecting: Detecting
) -> None:
    made = reserve_photo(worker, USER, add_project(worker, USER))
    for photo, prepare in ((made.photo_id, None), (detecting.photo, cancel)):
        if prepare is not None:
            prepare(worker, detecting.job)
        with pytest.raises(psycopg.Error) as refused:
            answer(worker, photo)
        assert refused.value.sqlstate == "UP003"
    assert job_row(worker, detecting.job).state == "working"
    assert [job.state for job in job_rows(worker)].count("done") == 0


def test_a_photo_that_is_not_there_or_is_being_deleted_takes_no_answer(
    worker: Connection, detecting: Detecting
) -> None:
    worker.execute("select * from upload_pipeline.begin_photo_deletion(%s)", [detecting.photo])
    for photo in (detecting.photo, uuid4()):
        with pytest.raises(psycopg.Error) as refused:
            answer(worker, photo)
        assert refused.value.sqlstate == "UP002"
    assert value(worker, "select upload_pipeline.finish_photo_deletion(%s)", detecting.photo)
    assert request(worker, detecting.photo) is None


def test_started_again_it_takes_another_answer(worker: Connection, detecting: Detecting) -> None:
    wait_for(worker, detecting.lease)
    answer(worker, detecting.photo, error="The photo is too dark.")
    retry(worker, detecting.job)
    assert answer(worker, detecting.photo)
    assert photo_row(worker, detecting.photo).detections == FOUND


def test_two_answers_at_once_are_one_answer(
    connect: Connect, admin: Connection, worker: Connection, detecting: Detecting
) -> None:
    wait_for(worker, detecting.lease)
    other = connect()
    with worker.transaction():
        assert answer(worker, detecting.photo)
        waiting = in_background(answer, other, detecting.photo)
        await_lock_wait(admin, other)
    assert waiting.result(10) is False
    assert event_codes(worker, detecting.job).count("job_done") == 1


def test_an_answer_and_the_worker_that_gives_up_at_once_leave_one_end(
    connect: Connect, admin: Connection, worker: Connection, detecting: Detecting
) -> None:
    other = connect()
    with worker.transaction():
        assert answer(worker, detecting.photo)
        waiting = in_background(fail, other, detecting.lease, retryable=False)
        await_lock_wait(admin, other)
    with pytest.raises(psycopg.Error) as refused:
        waiting.result(10)
    assert refused.value.sqlstate == "UP001"
    assert job_row(worker, detecting.job).state == "done"


def test_a_callback_that_is_cut_off_leaves_everything_as_it_was(worker: Connection, detecting: Detecting) -> None:
    wait_for(worker, detecting.lease)
    before = (job_row(worker, detecting.job), photo_row(worker, detecting.photo), request(worker, detecting.photo))

    with worker.transaction(force_rollback=True):
        assert answer(worker, detecting.photo)
    assert before == (
        job_row(worker, detecting.job),
        photo_row(worker, detecting.photo),
        request(worker, detecting.photo),
    )


# what was sent


def test_a_message_that_was_taken_is_noted_and_the_job_let_go(worker: Connection, detecting: Detecting) -> None:
    delivery = uuid4()
    told = wait_for(worker, detecting.lease, delivery, 1, "90 seconds")
    assert (told.stage, told.state) == ("detecting", "retryable")
    job, sent = job_row(worker, detecting.job), request(worker, detecting.photo)
    assert (sent.delivery_id, sent.attempt, sent.retry_count) == (delivery, 1, 0)
    assert sent.expires_at == job.run_at
    assert job.retry_count == 0
    again = wait_for(worker, detecting.lease, uuid4(), 7)
    assert (again.state, request(worker, detecting.photo)) == ("retryable", sent)


def test_a_new_delivery_takes_the_place_of_the_last_and_forgets_an_old_answer(
    worker: Connection, detecting: Detecting
) -> None:
    wait_for(worker, detecting.lease)
    answer(worker, detecting.photo, error="The photo is too dark.")
    retry(worker, detecting.job)
    lease = claim_one(worker)
    wait_for(worker, lease, attempt=2)
    sent = request(worker, detecting.photo)
    assert (sent.attempt, sent.answered_at, sent.answer_sha256) == (2, None, None)


def test_a_cancelled_job_ends_when_its_message_was_taken(worker: Connection, detecting: Detecting) -> None:
    cancel(worker, detecting.job)
    assert wait_for(worker, detecting.lease).state == "cancelled"


def test_a_lease_that_was_given_back_otherwise_is_no_message_that_was_taken(
    worker: Connection, detecting: Detecting
) -> None:
    snooze(worker, detecting.lease)
    with pytest.raises(psycopg.Error) as refused:
        wait_for(worker, detecting.lease)
    assert refused.value.sqlstate == "UP001"
    assert request(worker, detecting.photo) is None
