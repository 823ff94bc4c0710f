"""Submissions to a hosted parser: what the verbs read behind a long history, and what a second call of each writes."""

from __future__ import annotations

import itertools
import json
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    add_job,
    advance_to,
    await_lock_wait,
    claim_one,
    in_background,
    job_row,
    renew,
    retry,
    snooze,
    value,
)

DOCUMENTS = 3000

HISTORY = """
with made as (
  insert into upload_pipeline.documents
    (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
  select gen_random_uuid(), md5((i %% 100)::text)::uuid, 'a.pdf', 'application/pdf', 1,
         encode(sha256(i::text::bytea), 'hex'), gen_random_uuid()
    from generate_series(1, %s) i
  returning document_id, user_id
), jobs as (
  insert into upload_pipeline.upload_jobs (document_id, user_id, pipeline, stage, pool, state, run_at)
  select document_id, user_id, 'document', 'parsing', 'default', 'retryable', now() + interval '1 hour' from made
)
insert into upload_pipeline.parse_submissions
  (document_id, user_id, provider, tier, version, begun_at, parse_id, submitted_at)
select document_id, user_id, 'p', 't', 'v', now(), 'pjb-' || document_id, now() from made
"""


def blocks(db: Connection, query: str, arguments: list[Any]) -> int:
    """How many blocks a statement touched, with those inside of its functions, once the catalog is read."""
    db.execute(query, arguments)  # type: ignore[arg-type]
    row = db.execute(f"explain (analyze, buffers, format json) {query}", arguments).fetchone()  # type: ignore[arg-type]
    assert row is not None
    plan = row[0] if isinstance(row[0], list) else json.loads(row[0])
    found: int = plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]
    return found


def test_the_verbs_read_a_few_rows_however_many_parses_there_are(admin: Connection, worker: Connection) -> None:
    admin.execute(HISTORY, [DOCUMENTS])
    admin.execute(
        """
        update upload_pipeline.documents d
           set parse_provider = s.provider, parse_id = s.parse_id, parse_tier = s.tier, parse_version = s.version,
               parse_submitted_at = s.submitted_at
          from upload_pipeline.parse_submissions s where s.document_id = d.document_id
        """
    )
    add_job(admin, worker)
    lease = claim_one(worker)
    own = [lease.job_id, lease.lease_token]
    worker.execute("select * from upload_pipeline.begin_submission(%s, %s, 'p', 't', 'v', '1 s')", own)
    one = value(worker, "select parse_id from upload_pipeline.parse_submissions where parse_id is not null limit 1")
    # as the statistics say that there is nothing, and as they say how much there is
    for analysed in (False, True):
        if analysed:
            admin.execute("analyze")
        begin = blocks(worker, "select * from upload_pipeline.begin_submission(%s, %s, 'p', 't', 'v', '1 s')", own)
        unknown = blocks(worker, "select upload_pipeline.wake_parse('p', %s)", ["pjb-unknown"])
        assert (begin < 60, unknown < 60) == (True, True), (analysed, begin, unknown)
    assert value(worker, "select upload_pipeline.wake_parse('p', %s)", one) == 1
    assert value(worker, "select count(*) from upload_pipeline.upload_jobs where state = 'queued'") == 1


def submitted(admin: Connection, worker: Connection) -> tuple[Any, UUID]:
    """A job at `parsing`, and its submission."""
    add_job(admin, worker)
    lease = claim_one(worker)
    advance_to(worker, lease, "job_validated")
    own = [lease.job_id, lease.lease_token]
    begin = "select submission_id from upload_pipeline.begin_submission(%s, %s, 'p', 't', 'v', '1 s')"
    submission = value(worker, begin, *own)
    for _ in range(2):
        # the second time as after an answer that was lost
        row = worker.execute(
            "select stage, state from upload_pipeline.commit_submission(%s, %s, %s, 'pjb-1')", [*own, submission]
        ).fetchone()
        assert tuple(row or ()) == ("parsing", "working")
    return lease, submission


def test_a_second_call_of_each_verb_changes_nothing(admin: Connection, worker: Connection) -> None:
    lease, submission = submitted(admin, worker)
    own = [lease.job_id, lease.lease_token, submission]
    whole = "select to_jsonb(s)::text from upload_pipeline.parse_submissions s"
    worker.execute("select upload_pipeline.store_submission(%s, %s, %s, 'pjb-other')", own)
    assert value(worker, "select parse_id from upload_pipeline.documents") == "pjb-1"
    # known: no call may be announced, and none is over
    assert value(worker, "select upload_pipeline.announce_submission(%s, %s, %s, '1 s', '0 s')", *own) is False
    before = value(worker, whole)
    worker.execute("select upload_pipeline.end_submission_call(%s, %s, %s, false)", own)
    assert value(worker, whole) == before
    worker.execute("select upload_pipeline.finish_submission(%s, %s, %s, 4, '{2}')", own)
    finished = value(worker, whole)
    worker.execute("select upload_pipeline.finish_submission(%s, %s, %s, 5, '{}')", own)
    assert value(worker, whole) == finished
    assert value(worker, "select upload_pipeline.wake_parse('p', 'pjb-1')") == 0


@pytest.mark.parametrize("verdict", ["fail_submission(%s, %s, %s)", "finish_submission(%s, %s, %s, 1, '{}')"])
def test_a_hint_at_the_moment_of_the_verdict_sees_it(
    admin: Connection, worker: Connection, connect: Connect, verdict: str
) -> None:
    lease, submission = submitted(admin, worker)
    other = connect()
    with worker.transaction():
        own = [lease.job_id, lease.lease_token, submission]
        worker.execute(f"select upload_pipeline.{verdict}", own)  # type: ignore[arg-type]
        waking = in_background(value, other, "select upload_pipeline.wake_parse('p', 'pjb-1')")
        await_lock_wait(admin, other)
    assert waking.result(10) == 0
    job = job_row(admin, lease.job_id)
    assert job.run_at <= job.updated_at
    assert value(admin, "select told_at from upload_pipeline.parse_submissions") is None


def submitted_in_opposite_order(admin: Connection, worker: Connection) -> tuple[Any, Any, int]:
    """Two leases of one parse id, the lower job first and its document last, and how many jobs have that parse."""
    leases: list[Any] = []
    while True:
        leases.append(submitted(admin, worker)[0])
        for low, high in itertools.permutations(leases, 2):
            if low.job_id < high.job_id and low.document_id > high.document_id:
                return low, high, len(leases)


def test_a_hint_for_several_jobs_and_their_heartbeat_do_not_block_each_other_in_a_ring(
    admin: Connection, worker: Connection, other: Connection
) -> None:
    low, high, number = submitted_in_opposite_order(admin, worker)
    worker.execute("begin")
    renew(worker, [low])
    waking = in_background(value, other, "select upload_pipeline.wake_parse('p', 'pjb-1')")
    await_lock_wait(admin, other)
    assert set(renew(worker, [high])) == {high.job_id}  # as one heartbeat goes on to its next job
    worker.execute("commit")
    assert waking.result(10) == number


def test_a_hint_that_waits_for_a_job_holds_no_lane(admin: Connection, worker: Connection, other: Connection) -> None:
    low, high, number = submitted_in_opposite_order(admin, worker)
    for lease in (low, high):
        snooze(worker, lease)
    for held, free in ((low, high), (high, low)):
        with admin.transaction():
            admin.execute("select from upload_pipeline.upload_jobs where job_id = %s for update", [held.job_id])
            other.execute("begin")
            waking = in_background(value, other, "select upload_pipeline.wake_parse('p', 'pjb-1')")
            await_lock_wait(worker, other)  # not by `admin`, which sees one state of the others in a transaction
            owner = job_row(admin, free.job_id).user_id
            admin.execute("select from upload_pipeline.lanes where user_id = %s for no key update nowait", [owner])
        assert waking.result(10) == number
        other.execute("rollback")


def test_a_document_cannot_take_the_submission_of_another(admin: Connection, worker: Connection) -> None:
    _, foreign = submitted(admin, worker)
    add_job(admin, worker, uuid4())
    lease = claim_one(worker)
    advance_to(worker, lease, "job_validated")
    worker.execute(
        "select * from upload_pipeline.commit_submission(%s, %s, %s, 'pjb-2')",
        [lease.job_id, lease.lease_token, foreign],
    )
    taken = "select count(*) from upload_pipeline.documents where parse_id = 'pjb-2'"
    assert value(worker, taken) == 0


def test_a_lost_lease_writes_nothing(admin: Connection, worker: Connection) -> None:
    lease, submission = submitted(admin, worker)
    own = [lease.job_id, lease.lease_token, submission]
    retry(worker, lease.job_id, "job_validated", force=True)
    for call in (
        "store_submission(%s, %s, %s, 'pjb-3')",
        "announce_submission(%s, %s, %s, '1 s', '0 s')",
        "end_submission_call(%s, %s, %s, true)",
        "finish_submission(%s, %s, %s, 1, '{}')",
        "fail_submission(%s, %s, %s)",
        "commit_submission(%s, %s, %s, 'pjb-3')",
    ):
        with pytest.raises(psycopg.Error) as fenced:
            worker.execute(f"select upload_pipeline.{call}", own)  # type: ignore[arg-type]
        assert fenced.value.sqlstate == "UP001", call
    row = worker.execute("select parse_id, finished_at, failed_at from upload_pipeline.parse_submissions").fetchone()
    assert tuple(row or ()) == ("pjb-1", None, None)
    # the restart has forgotten who parsed the document; the submission is kept, and counts
    assert value(worker, "select parse_id from upload_pipeline.documents") is None


def test_submissions_go_with_their_document(admin: Connection, worker: Connection) -> None:
    submitted(admin, worker)
    document = value(worker, "select document_id from upload_pipeline.documents")
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [document])
    worker.execute("select upload_pipeline.finish_deletion(%s)", [document])
    assert value(worker, "select count(*) from upload_pipeline.parse_submissions") == 0
