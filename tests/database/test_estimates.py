"""What stands before a job, when it is done, and what asking costs."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connection
from verbs import EPOCH, add_document, advance, claim_one, enqueue, fail, set_clock, user_number, value

USER = user_number(500)
HOUR = timedelta(hours=1)

FILL = """
insert into upload_pipeline.documents
  (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
select lpad(to_hex(i), 32, '0')::uuid, (lpad(to_hex(i % 200 + 1), 16, '0') || '0000000000000001')::uuid, 'f',
       'text/plain', 100000, encode(sha256(i::text::bytea), 'hex'), i::text
  from generate_series(1, 100000) i;
insert into upload_pipeline.upload_jobs (job_id, document_id, user_id, pipeline, stage, pool)
select document_id, document_id, user_id, 'document', 'queued', 'default'
  from upload_pipeline.documents order by document_id;
insert into upload_pipeline.lanes (pool, user_id)
select 'default', user_id from upload_pipeline.documents group by user_id;
"""

HISTORY = """
insert into upload_pipeline.upload_jobs (job_id, document_id, user_id, pipeline, stage, pool, state, finished_at)
select gen_random_uuid(), gen_random_uuid(), case when i <= 20000 then %s else gen_random_uuid() end, 'document',
       'embedded', 'default', 'done', now()
  from generate_series(1, 30000) i
"""


def become(db: Connection, user: UUID) -> None:
    """Makes the rest of the transaction the user's."""
    db.execute("select set_config('role', 'authenticated', true)")
    db.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(user)})])


def estimate(db: Connection, jobs: list[UUID], user: UUID = USER, default: float = 60) -> dict[UUID, Any]:
    """What `estimate_jobs` answers a user, by job."""
    with db.transaction():
        become(db, user)
        rows = db.execute("select * from upload_pipeline.estimate_jobs(%s, %s)", [jobs, default]).fetchall()
    return {row.job_id: row for row in rows}


def job_of(admin: Connection, worker: Connection, user: UUID = USER, priority: int = 0, file_bytes: int = 10) -> UUID:
    document = add_document(admin, user)
    admin.execute("update upload_pipeline.documents set file_bytes = %s where document_id = %s", [file_bytes, document])
    return enqueue(worker, document, user, priority)


def run_through(worker: Connection, seconds: float, start: float) -> float:
    """Leads the next job through all stages, each `seconds` long by the fake clock; when it is done."""
    set_clock(worker, start)
    lease = claim_one(worker, ttl="1 day")
    stages = value(
        worker, "select array_agg(stage order by position) from upload_pipeline.stages where pipeline = 'document'"
    )
    for here, there in itertools.pairwise(stages):
        start += seconds
        set_clock(worker, start)
        advance(worker, lease, here, there)
    return start


@pytest.mark.parametrize(
    ("file_bytes", "expected"),
    [(1, 0), (65536, 0), (65537, 1), (262144, 1), (262145, 2), (25 * 1024**2, 5), (2**40, 6)],
)
def test_sizes_fall_into_classes(worker: Connection, file_bytes: int, expected: int) -> None:
    assert value(worker, "select upload_pipeline.size_class(%s)", file_bytes) == expected


def test_without_history_the_setting_counts(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    job = job_of(admin, worker)
    assert estimate(worker, [job], default=60)[job].estimated_completion_at == EPOCH + timedelta(seconds=60)
    assert estimate(worker, [job], default=600)[job].estimated_completion_at == EPOCH + timedelta(seconds=600)


def test_history_of_the_files_size_counts(admin: Connection, worker: Connection) -> None:
    job_of(admin, worker, file_bytes=1000)
    ended = run_through(worker, seconds=2, start=0)
    job_of(admin, worker, file_bytes=10_000_000)
    ended = run_through(worker, seconds=30, start=ended)
    assert value(worker, "select upload_pipeline.refresh_stage_durations()") == 20
    for file_bytes, seconds in ((900, 20), (9_000_000, 300), (20_000_000, 300), (300_000, 20)):
        job = job_of(admin, worker, file_bytes=file_bytes)
        done = estimate(worker, [job])[job].estimated_completion_at
        assert done == EPOCH + timedelta(seconds=ended + seconds), file_bytes
        worker.execute("select upload_pipeline.cancel_job(%s)", [job])


def test_time_that_a_job_waits_for_its_turn_or_failed_is_no_duration(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    job_of(admin, worker)
    lease = claim_one(worker, ttl="1 day")
    set_clock(worker, 500)
    fail(worker, lease, jitter=0.5)
    set_clock(worker, 900)
    value(worker, "select upload_pipeline.promote_due(10)")
    run_through(worker, seconds=1, start=2000)
    worker.execute("select upload_pipeline.refresh_stage_durations()")
    rows = worker.execute("select distinct seconds, samples from upload_pipeline.stage_durations").fetchall()
    assert rows == [(1.0, 1)]


def test_a_refresh_soon_after_another_does_nothing(admin: Connection, worker: Connection) -> None:
    job_of(admin, worker)
    run_through(worker, seconds=1, start=0)
    assert value(worker, "select upload_pipeline.refresh_stage_durations()") == 10
    assert value(worker, "select upload_pipeline.refresh_stage_durations()") == 0
    assert value(worker, "select upload_pipeline.refresh_stage_durations(p_pause => '0')") == 10


def test_a_working_job_counts_down_within_its_stage(admin: Connection, worker: Connection) -> None:
    job_of(admin, worker)
    ended = run_through(worker, seconds=10, start=0)
    worker.execute("select upload_pipeline.refresh_stage_durations()")
    job = job_of(admin, worker)
    lease = claim_one(worker, ttl="1 day")
    for here, there in (("queued", "job_validated"), ("job_validated", "parsing")):
        advance(worker, lease, here, there)
    for spent, left in ((0, 80), (4, 76), (10, 70), (50, 70)):
        set_clock(worker, ended + spent)
        told = estimate(worker, [job])[job]
        assert told.estimated_completion_at == EPOCH + timedelta(seconds=ended + spent + left)
        assert told.queued_ahead == 0
        assert told.progress == 20


def test_a_retry_is_not_expected_before_it_is_due(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    job = job_of(admin, worker)
    lease = claim_one(worker)
    worker.execute("select upload_pipeline.snooze_job(%s, %s, '1 hour')", [lease.job_id, lease.lease_token])
    assert estimate(worker, [job])[job].estimated_completion_at == EPOCH + HOUR + timedelta(seconds=60)


def test_lanes_take_turns_so_that_a_long_one_is_not_all_ahead(admin: Connection, worker: Connection) -> None:
    mine = [job_of(admin, worker) for _ in range(4)]
    for user, jobs in ((user_number(1), 10), (user_number(2), 1), (user_number(3), 2)):
        for _ in range(jobs):
            job_of(admin, worker, user)
    told = estimate(worker, mine)
    #  own lane + least(place, depth) of lanes of 10, 1 and 2
    assert [told[job].queued_ahead for job in mine] == [0, 1 + 1 + 1 + 1, 2 + 2 + 1 + 2, 3 + 3 + 1 + 2]
    urgent = job_of(admin, worker, priority=5)
    assert estimate(worker, [urgent])[urgent].queued_ahead == 0
    assert estimate(worker, mine[:1])[mine[0]].queued_ahead == 4


def test_more_slots_shorten_the_wait_as_far_as_the_cap_lets_them(admin: Connection, worker: Connection) -> None:
    set_clock(worker)
    jobs = [job_of(admin, worker) for _ in range(5)]

    def wait() -> float:
        done = estimate(worker, jobs[4:])[jobs[4]].estimated_completion_at
        return float((done - EPOCH).total_seconds()) - 60

    assert wait() == pytest.approx(240)
    other = uuid4()
    worker.execute("select upload_pipeline.register_worker(%s, 'h', 1, 'v', '{default}', 8)", [other])
    assert wait() == pytest.approx(120)  # two at once is the cap
    worker.execute("select upload_pipeline.set_lane_cap(%s, 'default', 4)", [USER])
    assert wait() == pytest.approx(60)
    worker.execute("select upload_pipeline.leave_pools(%s, '{default}')", [other])
    assert wait() == pytest.approx(240), "what is left to others has no slots here"


def test_ended_and_foreign_jobs_are_not_told(admin: Connection, worker: Connection) -> None:
    ended, foreign, mine = job_of(admin, worker), job_of(admin, worker, user_number(7)), job_of(admin, worker)
    worker.execute("select upload_pipeline.cancel_job(%s)", [ended])
    assert estimate(worker, [ended, foreign, mine, uuid4()]).keys() == {mine}
    assert estimate(worker, []) == {}


def test_nobody_gets_no_estimate(worker: Connection) -> None:
    worker.execute("set role authenticated")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        worker.execute("select * from upload_pipeline.estimate_jobs('{}')")


def test_the_cost_is_bounded_over_a_hundred_thousand_jobs(admin: Connection, worker: Connection) -> None:
    """Blocks read, counted with and without statistics; a walk over everything would be hundreds of thousands."""
    admin.execute("set session_replication_role = replica")
    admin.execute(FILL)
    admin.execute("set session_replication_role = origin")
    user = user_number(200)
    jobs = [
        row.job_id
        for row in admin.execute(
            "select job_id from upload_pipeline.upload_jobs where user_id = %s order by seq", [user]
        ).fetchall()
    ]
    for analyzed in (False, True):
        if analyzed:
            admin.execute("analyze upload_pipeline.upload_jobs, upload_pipeline.lanes, upload_pipeline.documents")
        for asked, bound in ((jobs[:1], 2_000), (jobs[-1:], 15_000), (jobs[-100:], 20_000)):
            estimate(worker, asked, user)  # a session's first call reads the catalog
            with worker.transaction():
                become(worker, user)
                plan = value(
                    worker,
                    "explain (analyze, buffers, format json) select * from upload_pipeline.estimate_jobs(%s)",
                    asked,
                )[0]["Plan"]
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < bound
    told = estimate(worker, [jobs[0], jobs[10], jobs[-1]], user)
    assert [told[job].queued_ahead for job in (jobs[0], jobs[10], jobs[-1])] == [0, 10 * 200, 10_000]


def test_the_history_of_a_user_is_not_read_where_others_have_little(admin: Connection, worker: Connection) -> None:
    """A plan for whomsoever takes each user for an average one, whose jobs are soon read: this one has 20,000."""
    admin.execute("set session_replication_role = replica")
    admin.execute(HISTORY, [USER])
    admin.execute("set session_replication_role = origin")
    job = job_of(admin, worker)
    admin.execute("analyze upload_pipeline.upload_jobs")
    estimate(worker, [job])  # a session's first call reads the catalog
    with worker.transaction():
        become(worker, USER)
        plan = value(
            worker, "explain (analyze, buffers, format json) select * from upload_pipeline.estimate_jobs(%s)", [job]
        )[0]["Plan"]
    assert plan["Actual Rows"] == 1
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 200
