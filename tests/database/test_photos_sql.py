"""The verbs of photos: repeated, at once, cut off and out of order; and how a photo's status follows its job."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from photo_verbs import (
    PHOTO_STAGES,
    add_organization,
    add_project,
    announce_photo,
    history,
    photo_row,
    reserve_photo,
)
from sessions import Connect, Connection
from verbs import (
    EPOCH,
    add_job,
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
    release,
    retry,
    set_clock,
    snooze,
    terminate,
    user_number,
    value,
)

USER, COLLEAGUE, STRANGER = user_number(1), user_number(2), user_number(3)


@pytest.fixture
def project(worker: Connection) -> UUID:
    set_clock(worker)
    organization = add_organization(worker, USER)
    worker.execute("select upload_pipeline.set_member(%s, %s, 'viewer')", [organization, COLLEAGUE])
    return add_project(worker, USER, organization)


@pytest.fixture
def made(worker: Connection, project: UUID) -> Any:
    return reserve_photo(worker, USER, project)


def lead(db: Connection, lease: Any, stage: str) -> None:
    path = PHOTO_STAGES[PHOTO_STAGES.index(lease.stage) : PHOTO_STAGES.index(stage) + 1]
    for here, there in itertools.pairwise(path):
        advance(db, lease, here, there)


def begin_deletion(db: Connection, photo: UUID) -> Any:
    return db.execute("select * from upload_pipeline.begin_photo_deletion(%s, 'request-2')", [photo]).fetchone()


def finish_deletion(db: Connection, photo: UUID) -> bool:
    return bool(value(db, "select upload_pipeline.finish_photo_deletion(%s, 'request-2')", photo))


def expire(db: Connection, grace: str = "1 hour") -> list[UUID]:
    rows = db.execute("select photo_id from upload_pipeline.begin_photo_expiry(%s)", [grace]).fetchall()
    return [row.photo_id for row in rows]


def test_a_photo_is_announced_with_its_job_in_one_call(worker: Connection, project: UUID, made: Any) -> None:
    photo, job = photo_row(worker, made.photo_id), job_row(worker, made.job_id)
    assert (photo.status, photo.uploaded_at, photo.upload_deadline) == (
        "pending_upload",
        None,
        EPOCH + timedelta(minutes=15),
    )
    assert (photo.project_id, photo.user_id, photo.detection_types) == (project, USER, ["damage"])
    assert (job.photo_id, job.document_id, job.pipeline, job.stage) == (
        made.photo_id,
        None,
        "photo",
        "pending_upload",
    )
    assert event_codes(worker, made.job_id) == ["job_enqueued", "photo_status_changed"]
    lease = claim_one(worker)
    assert (lease.subject_id, lease.pipeline, lease.correlation_id) == (made.photo_id, "photo", "request-1")


def test_a_photo_that_is_announced_twice_under_one_id_is_refused_whole(worker: Connection, project: UUID) -> None:
    made = reserve_photo(worker, USER, project)
    before = job_rows(worker)
    with pytest.raises(psycopg.errors.UniqueViolation):
        reserve_photo(worker, USER, project, made.photo_id)
    assert job_rows(worker) == before


@pytest.mark.parametrize(("user", "sqlstate"), [(STRANGER, "UP002"), (COLLEAGUE, "UP006")])
def test_who_may_not_upload_leaves_nothing(worker: Connection, project: UUID, user: UUID, sqlstate: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        reserve_photo(worker, user, project)
    assert refused.value.sqlstate == sqlstate
    assert job_rows(worker) == []
    assert value(worker, "select count(*) from upload_pipeline.photos") == 0


def test_a_job_is_about_a_document_or_a_photo_and_never_both_or_neither(
    admin: Connection, worker: Connection, made: Any
) -> None:
    job = add_job(admin, worker)
    for change, arguments in (("photo_id = %s", [made.photo_id]), ("document_id = null", [])):
        with pytest.raises(psycopg.errors.CheckViolation, match="subject"):
            admin.execute(f"update upload_pipeline.upload_jobs set {change} where job_id = %s", [*arguments, job])


def test_within_a_users_lane_the_more_urgent_photo_is_first(worker: Connection, project: UUID) -> None:
    photos = {word: reserve_photo(worker, USER, project, priority=word).photo_id for word in ("low", "normal", "high")}
    taken = []
    for _ in photos:
        lease = claim_one(worker)
        taken.append(lease.subject_id)
        lead(worker, lease, "completed")
    assert taken == [photos["high"], photos["normal"], photos["low"]]


def test_the_status_follows_the_job_with_the_time_of_each_change(worker: Connection, made: Any) -> None:
    lease = claim_one(worker)
    assert photo_row(worker, made.photo_id).status == "pending_upload"
    seen = []
    for seconds, (here, there) in enumerate(itertools.pairwise(PHOTO_STAGES), 1):
        set_clock(worker, seconds)
        advance(worker, lease, here, there)
        seen.append(photo_row(worker, made.photo_id).status)
    assert seen == ["uploaded", "processing", "processing", "processing", "completed"]
    assert history(worker, made.job_id) == ["pending_upload", "uploaded", "processing", "completed"]
    photo = photo_row(worker, made.photo_id)
    assert (photo.uploaded_at, photo.upload_deadline) == (EPOCH + timedelta(seconds=1), None)


def test_a_dead_letter_and_a_cancelled_job_are_a_failed_photo_until_they_are_retried(
    worker: Connection, project: UUID, made: Any
) -> None:
    lease = claim_one(worker)
    lead(worker, lease, "extracting")
    fail(worker, lease)
    assert photo_row(worker, made.photo_id).status == "processing"
    set_clock(worker, 60)
    promote(worker)
    fail(worker, claim_one(worker), retryable=False)
    assert photo_row(worker, made.photo_id).status == "failed"
    retry(worker, made.job_id)
    assert photo_row(worker, made.photo_id).status == "processing"
    cancel(worker, made.job_id)
    retry(worker, made.job_id, "pending_upload")
    assert history(worker, made.job_id) == [
        "pending_upload",
        "uploaded",
        "processing",
        "failed",
        "processing",
        "failed",
        "uploaded",
    ]
    lead(worker, claim_one(worker), "completed")
    assert photo_row(worker, made.photo_id).status == "completed"


def test_a_worker_that_is_lost_for_good_leaves_a_failed_photo(worker: Connection, made: Any) -> None:
    for seconds in (0, 100, 200, 300):
        set_clock(worker, seconds)
        promote(worker)
        claim_one(worker)
        set_clock(worker, seconds + 61)
        assert reap(worker) == 1
    assert photo_row(worker, made.photo_id).status == "failed"


def test_a_claim_a_release_and_a_snooze_change_no_status(worker: Connection, made: Any) -> None:
    release(worker, [claim_one(worker)])
    snooze(worker, claim_one(worker))
    assert history(worker, made.job_id) == ["pending_upload"]


def test_saying_that_the_bytes_are_there_wakes_the_job_once(worker: Connection, made: Any) -> None:
    snooze(worker, claim_one(worker))
    set_clock(worker, 5)
    assert [announce_photo(worker, made.photo_id) for _ in range(2)] == ["uploaded", "uploaded"]
    assert job_row(worker, made.job_id).state == "queued"
    assert history(worker, made.job_id) == ["pending_upload", "uploaded"]
    photo = photo_row(worker, made.photo_id)
    # nobody has checked them yet
    assert (photo.uploaded_at, photo.upload_deadline) == (
        EPOCH + timedelta(seconds=5),
        EPOCH + timedelta(minutes=15),
    )
    assert event_codes(worker, made.job_id).count("job_promoted") == 1


def test_saying_it_later_changes_nothing(worker: Connection, made: Any) -> None:
    lease = claim_one(worker)
    lead(worker, lease, "extracting")
    before = photo_row(worker, made.photo_id), job_rows(worker)
    assert announce_photo(worker, made.photo_id) == "processing"
    assert (photo_row(worker, made.photo_id), job_rows(worker)) == before
    for here, there in itertools.pairwise(PHOTO_STAGES[2:]):
        advance(worker, lease, here, there)
    assert announce_photo(worker, made.photo_id) == "completed"


@pytest.mark.parametrize("status", ["processing", "completed", "failed"])
def test_what_only_the_job_reaches_is_refused_by_the_status_that_there_is(
    worker: Connection, made: Any, status: str
) -> None:
    before = photo_row(worker, made.photo_id), job_rows(worker)
    with pytest.raises(psycopg.Error, match=f'is "pending_upload" and cannot become "{status}"') as refused:
        announce_photo(worker, made.photo_id, status)
    assert refused.value.sqlstate == "UP003"
    assert (photo_row(worker, made.photo_id), job_rows(worker)) == before


@pytest.mark.parametrize("code", ["CHECKSUM_MISMATCH", "MALWARE_FOUND", "CORRUPT_IMAGE"])
def test_a_photo_whose_bytes_were_refused_is_not_said_to_be_uploaded(worker: Connection, made: Any, code: str) -> None:
    fail(worker, claim_one(worker), retryable=False, code=code)
    assert photo_row(worker, made.photo_id).uploaded_at == EPOCH
    with pytest.raises(psycopg.Error, match='is "failed"') as refused:
        announce_photo(worker, made.photo_id)
    assert refused.value.sqlstate == "UP003"


@pytest.mark.parametrize("code", ["UPLOAD_EXPIRED", "STORAGE_UNAVAILABLE"])
def test_a_photo_that_failed_before_its_bytes_came_starts_again_when_they_are_there(
    worker: Connection, made: Any, code: str
) -> None:
    fail(worker, claim_one(worker), retryable=False, code=code)
    assert photo_row(worker, made.photo_id).uploaded_at is None
    assert [announce_photo(worker, made.photo_id) for _ in range(2)] == ["uploaded", "uploaded"]
    assert job_row(worker, made.job_id).state == "queued"
    assert history(worker, made.job_id) == ["pending_upload", "failed", "uploaded"]


def test_a_photo_whose_job_was_cancelled_stays_so(worker: Connection, made: Any) -> None:
    cancel(worker, made.job_id)
    with pytest.raises(psycopg.Error, match='is "failed"'):
        announce_photo(worker, made.photo_id)


def test_two_who_say_it_at_once_make_one_change(worker: Connection, connect: Connect, made: Any) -> None:
    other = connect()
    set_clock(other, 9)
    with worker.transaction():
        announce_photo(worker, made.photo_id)
        second = in_background(announce_photo, other, made.photo_id)
        await_lock_wait(connect(), other)
    assert second.result(timeout=10) == "uploaded"
    assert history(worker, made.job_id) == ["pending_upload", "uploaded"]
    assert photo_row(worker, made.photo_id).uploaded_at == EPOCH


def test_one_that_is_cut_off_while_saying_it_has_said_nothing(
    admin: Connection, worker: Connection, connect: Connect, made: Any
) -> None:
    victim = connect()
    victim.execute("begin")
    announce_photo(victim, made.photo_id)
    terminate(admin, victim)
    assert photo_row(worker, made.photo_id).status == "pending_upload"
    assert announce_photo(worker, made.photo_id) == "uploaded"


def test_deletion_hides_ends_the_job_and_is_safe_to_repeat(worker: Connection, made: Any) -> None:
    lease = claim_one(worker)
    assert finish_deletion(worker, made.photo_id) is False  # not begun
    first = begin_deletion(worker, made.photo_id)
    assert first.raw_key.endswith(f"{made.photo_id}.jpg")
    assert begin_deletion(worker, made.photo_id) == first
    assert job_row(worker, made.job_id).state == "cancelled"
    with pytest.raises(psycopg.Error) as late:
        advance(worker, lease, "pending_upload", "uploaded")
    assert late.value.sqlstate == "UP001"
    for verb in (lambda: announce_photo(worker, made.photo_id), lambda: retry(worker, made.job_id)):
        with pytest.raises(psycopg.Error) as refused:
            verb()
        assert refused.value.sqlstate in ("UP002", "UP003")
    # hidden before its job ended: nobody was told of a failure
    assert history(worker, made.job_id) == ["pending_upload"]
    unfinished = "select photo_id from upload_pipeline.unfinished_photo_deletions(%s)"
    set_clock(worker, 10)
    assert value(worker, unfinished, EPOCH + timedelta(seconds=1)) == made.photo_id
    assert [finish_deletion(worker, made.photo_id) for _ in range(2)] == [True, False]
    assert begin_deletion(worker, made.photo_id) is None
    assert job_rows(worker) == []
    told = worker.execute(
        "select code, correlation_id from upload_pipeline.events where payload ->> 'photo_id' = %s order by event_id",
        [str(made.photo_id)],
    ).fetchall()
    assert [tuple(row) for row in told][-2:] == [
        ("photo_deletion_started", "request-2"),
        ("photo_deleted", "request-2"),
    ]


def test_a_deletion_waits_for_a_step_that_is_being_written(worker: Connection, connect: Connect, made: Any) -> None:
    lease = claim_one(worker)
    other = connect()
    set_clock(other)
    with worker.transaction():
        advance(worker, lease, "pending_upload", "uploaded")
        deleted = in_background(begin_deletion, other, made.photo_id)
        await_lock_wait(connect(), other)
    assert deleted.result(timeout=10).photo_id == made.photo_id
    assert job_row(worker, made.job_id).state == "cancelled"


def test_what_did_not_come_expires_and_nothing_else(worker: Connection, project: UUID) -> None:
    names = ("waiting", "expired", "cancelled", "said", "checked", "refused", "outage")
    made = {name: reserve_photo(worker, USER, project) for name in names}
    announce_photo(worker, made["said"].photo_id)
    cancel(worker, made["cancelled"].job_id)
    by_photo = {row.photo_id: name for name, row in made.items()}
    for _ in range(len(names) - 1):
        lease = claim_one(worker)
        match by_photo[lease.subject_id]:
            case "checked":
                lead(worker, lease, "completed")
            case "expired":
                fail(worker, lease, retryable=False, code="UPLOAD_EXPIRED")
            case "refused":
                fail(worker, lease, retryable=False, code="CHECKSUM_MISMATCH")
            case "outage":
                fail(worker, lease, retryable=False, code="STORAGE_UNAVAILABLE")
            case _:
                snooze(worker, lease, "1 day")
    set_clock(worker, 15 * 60 + 3600)
    assert expire(worker) == []
    set_clock(worker, 15 * 60 + 3601)
    assert set(expire(worker)) == {made["expired"].photo_id, made["cancelled"].photo_id}
    assert expire(worker) == []
    with pytest.raises(psycopg.Error) as gone:
        announce_photo(worker, made["expired"].photo_id)
    assert gone.value.sqlstate == "UP002"
    assert value(worker, "select count(*) from upload_pipeline.events where code = 'photo_expired'") == 2
    # nobody knows whether these have come: their jobs look
    assert job_row(worker, made["waiting"].job_id).state == "retryable"
    assert photo_row(worker, made["refused"].photo_id).status == "failed"
    again = claim_one(worker)
    assert again.subject_id == made["outage"].photo_id
    fail(worker, again, retryable=False, code="UPLOAD_EXPIRED")
    assert expire(worker) == [made["outage"].photo_id]


def test_expiry_passes_over_a_photo_that_is_being_said_to_have_come(
    worker: Connection, connect: Connect, made: Any
) -> None:
    fail(worker, claim_one(worker), retryable=False, code="UPLOAD_EXPIRED")
    other = connect()
    set_clock(other, 2 * 3600)
    with worker.transaction():
        announce_photo(worker, made.photo_id)
        assert expire(other) == []
    assert expire(other) == []
    assert photo_row(worker, made.photo_id).status == "uploaded"


# who sees what


def as_user(db: Connection, user: UUID, query: str, *arguments: Any) -> list[Any]:
    with db.transaction(force_rollback=True):
        db.execute("set local role authenticated")
        db.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(user)})])
        return db.execute(query, arguments).fetchall()  # type: ignore[arg-type]


def test_members_see_the_organisations_photos_and_nobody_else_does(worker: Connection, made: Any) -> None:
    for table in ("photos", "projects", "organizations", "organization_members"):
        query = f"select from upload_pipeline.{table}"
        expected = 2 if table == "organization_members" else 1
        assert len(as_user(worker, USER, query)) == expected, table
        assert len(as_user(worker, COLLEAGUE, query)) == expected, table
        assert as_user(worker, STRANGER, query) == [], table
    begin_deletion(worker, made.photo_id)
    assert as_user(worker, USER, "select from upload_pipeline.photos") == []


def test_a_colleague_reads_how_it_went_though_the_job_is_not_theirs(worker: Connection, made: Any) -> None:
    fail(worker, claim_one(worker), retryable=False, code="CORRUPT_FILE")
    query = "select * from upload_pipeline.photo_progress(%s)"
    (row,) = as_user(worker, COLLEAGUE, query, [made.photo_id])
    assert (row.job_id, row.error_code, row.error_message) == (made.job_id, "CORRUPT_FILE", "it broke")
    assert (row.statuses, row.times) == (["pending_upload", "failed"], [EPOCH, EPOCH])
    assert as_user(worker, COLLEAGUE, "select from upload_pipeline.upload_jobs") == []
    assert as_user(worker, STRANGER, query, [made.photo_id]) == []


def test_a_member_who_has_left_sees_nothing_more(worker: Connection, project: UUID, made: Any) -> None:
    organization = photo_row(worker, made.photo_id).organization_id
    with pytest.raises(psycopg.Error, match="no owner") as refused:
        worker.execute("select upload_pipeline.remove_member(%s, %s)", [organization, USER])
    assert refused.value.sqlstate == "UP003"
    assert value(worker, "select upload_pipeline.remove_member(%s, %s)", organization, COLLEAGUE) is True
    assert value(worker, "select upload_pipeline.remove_member(%s, %s)", organization, COLLEAGUE) is False
    assert as_user(worker, COLLEAGUE, "select from upload_pipeline.photos") == []


def test_the_last_owner_stays_owner_though_two_step_down_at_once(
    worker: Connection, connect: Connect, project: UUID
) -> None:
    organization = value(worker, "select organization_id from upload_pipeline.projects")
    change = "select upload_pipeline.set_member(%s, %s, %s)"
    worker.execute(change, [organization, COLLEAGUE, "owner"])
    other = connect()
    with worker.transaction():
        worker.execute(change, [organization, USER, "member"])
        second = in_background(other.execute, change, [organization, COLLEAGUE, "member"])
        await_lock_wait(connect(), other)
    with pytest.raises(psycopg.Error, match="no owner"):
        second.result(timeout=10)


@pytest.mark.parametrize(
    ("call", "sqlstate"),
    [
        ("select upload_pipeline.set_member(gen_random_uuid(), gen_random_uuid(), 'owner')", "UP002"),
        ("select upload_pipeline.add_project(gen_random_uuid(), 'a')", "UP002"),
        ("select upload_pipeline.set_project(gen_random_uuid(), 'a')", "UP002"),
        ("select upload_pipeline.announce_photo(gen_random_uuid(), 'uploaded')", "UP002"),
        ("select upload_pipeline.add_organization(name) from upload_pipeline.organizations", "UP003"),
        ("select upload_pipeline.add_project(organization_id, name) from upload_pipeline.projects", "UP003"),
    ],
)
def test_what_is_not_there_or_is_there_already_is_named(
    worker: Connection, project: UUID, call: str, sqlstate: str
) -> None:
    with pytest.raises(psycopg.Error) as refused:
        worker.execute(call)  # type: ignore[call-overload]
    assert refused.value.sqlstate == sqlstate


def test_a_project_is_changed_in_what_is_given(worker: Connection, project: UUID) -> None:
    worker.execute("select upload_pipeline.set_project(%s, p_drop_gps => true)", [project])
    worker.execute("select upload_pipeline.set_project(%s, 'roofs')", [project])
    row = worker.execute("select name, drop_gps from upload_pipeline.projects").fetchone()
    assert tuple(row) == ("roofs", True)  # type: ignore[arg-type]
    organization = value(worker, "select organization_id from upload_pipeline.projects")
    other = add_project(worker, USER, organization)
    with pytest.raises(psycopg.Error, match="already"):
        worker.execute("select upload_pipeline.set_project(%s, 'roofs')", [other])


def test_a_claim_serves_documents_and_photos_of_one_lane_under_one_cap(
    admin: Connection, worker: Connection, project: UUID
) -> None:
    set_clock(worker)
    reserve_photo(worker, USER, project)
    add_job(admin, worker, USER)
    reserve_photo(worker, USER, project)
    leases = worker.execute("select pipeline from upload_pipeline.claim_jobs(%s, 'default', 10)", [uuid4()]).fetchall()
    assert [lease.pipeline for lease in leases] == ["photo", "document"]
