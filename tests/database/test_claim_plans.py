"""What the verbs read, counted in blocks, on tables as large as they get, with statistics and without.

EXPLAIN shows no plan inside a function, but the blocks that it counts for a call include those of every statement
within: so what a verb reads is bounded here whatever plan it takes. A block is 8 kB; reading one index entry of a
large table costs three or four.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from sessions import Connect, Connection
from verbs import add_document, claim, claim_one, release, user_number, value

BACKLOG = 1_000_000
FINISHED = 1_000_000
LANES = 100_000

CLAIM_BOUND = 1_500
"""Blocks for a claim of ten jobs, whose own rows, indexes, events and lanes are some twenty blocks a job."""

ROWS_BOUND = 1_000
"""Rows of jobs and lanes for such a claim: its own, and those at work in the lanes that it looks at."""

HEAVY = UUID(int=2)
"""The user with the backlog: in front of everybody else in the walk."""

ADD_ROWS = """
insert into upload_pipeline.upload_jobs
  (job_id, document_id, user_id, pipeline, stage, pool, state, priority, created_at, finished_at, worker_id,
   lease_expires_at)
select lpad(to_hex(i + %(from)s), 32, '0')::uuid, lpad(to_hex(i + %(from)s), 32, '0')::uuid,
       coalesce(%(user)s::uuid, (lpad(to_hex(i + 16), 16, '0') || '0000000000000001')::uuid),
       'document', case when %(state)s = 'done' then 'embedded' else 'queued' end, 'default',
       %(state)s::upload_pipeline.job_state, 0, now(), case when %(state)s = 'done' then now() end,
       case when %(state)s = 'working' then gen_random_uuid() end,
       case when %(state)s = 'working' then now() + interval '1 hour' end
  from generate_series(1, %(count)s) i
"""


def add_rows(admin: Connection, start: int, count: int, state: str, user: UUID | None) -> None:
    admin.execute(ADD_ROWS, {"from": start, "count": count, "state": state, "user": user})


def blocks(db: Connection, call: str, *arguments: Any) -> int:
    """Blocks that a call touches, those of every statement within it included."""
    plan = value(db, f"explain (analyze, buffers, format json) select * from upload_pipeline.{call}", *arguments)[0]
    node = plan["Plan"]
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def rows_read(db: Connection) -> int:
    """Rows of jobs and lanes that this transaction has read so far."""
    return int(
        value(
            db,
            """
            select coalesce(sum(coalesce(idx_tup_fetch, 0) + seq_tup_read), 0) from pg_catalog.pg_stat_xact_user_tables
             where relname in ('upload_jobs', 'lanes')
            """,
        )
    )


def measured_claims(db: Connection, admin: Connection, calls: int = 8) -> list[int]:
    """Blocks of some claims of ten in a row, past the call at which a plan may become a generic one."""
    worst, cursor = [], None
    with db.transaction(force_rollback=True):
        claim(db, limit=10)  # a session's first call reads the catalog
    for _ in range(calls):
        with db.transaction():
            before = rows_read(db)
            worst.append(blocks(db, "claim_jobs(%s, 'default', 10, %s)", uuid4(), cursor))
            assert rows_read(db) - before < ROWS_BOUND
        last = admin.execute(
            "select user_id from upload_pipeline.upload_jobs where state = 'working' order by user_id desc limit 1"
        ).fetchone()
        cursor = last.user_id if last else None
    return worst


def end_claims(admin: Connection) -> None:
    """Ends what is at work, and leaves the dead rows that this makes."""
    admin.execute(
        """
        update upload_pipeline.upload_jobs set state = 'done', finished_at = now(), worker_id = null,
               lease_expires_at = null where state = 'working'
        """
    )


def test_what_a_verb_reads_does_not_grow_with_anybodys_backlog_or_history(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    figures: dict[str, list[int]] = {}
    admin.execute("alter table upload_pipeline.upload_jobs set (autovacuum_enabled = off)")
    admin.execute("alter table upload_pipeline.lanes set (autovacuum_enabled = off)")
    admin.execute("analyze upload_pipeline.upload_jobs")  # the statistics of an empty table
    admin.execute("set session_replication_role = replica")
    admin.execute("drop index upload_pipeline.upload_jobs_listing")  # no verb reads it; the rows come in sooner

    add_rows(admin, 0, BACKLOG, "queued", HEAVY)
    add_rows(admin, 10_000_000, 1_000, "queued", None)
    admin.execute(
        """
        insert into upload_pipeline.lanes (pool, user_id)
        select distinct pool, user_id from upload_pipeline.upload_jobs where job_id > %s union values ('default', %s)
        """,
        [UUID(int=10_000_000), HEAVY],
    )
    figures["one user's million in front, no statistics"] = measured_claims(worker, admin)
    first = claim(worker, limit=10, after=HEAVY)
    assert len({lease.user_id for lease in first}) == 10
    release(worker, first)

    # the heavy user is at the cap: two jobs at work
    end_claims(admin)
    while len(mine := [x for x in claim(worker, limit=1) if x.user_id == HEAVY]) < 1:
        pass
    claim(worker, limit=1)
    assert (
        value(admin, "select count(*) from upload_pipeline.upload_jobs where state = 'working' and user_id = %s", HEAVY)
        == 2
    )
    assert mine
    figures["that user at the cap"] = measured_claims(worker, admin)

    # a million rows of history that nobody has vacuumed
    add_rows(admin, 20_000_000, FINISHED, "done", HEAVY)
    end_claims(admin)
    claim(worker, limit=10)  # passes the dead entries and marks them
    figures["a million finished, unvacuumed"] = measured_claims(worker, admin)

    fresh = connect()
    bounds: dict[str, tuple[int, int]] = {}
    lease = claim_one(fresh)
    named = [lease.job_id], [lease.lease_token]
    bounds["renew_leases"] = blocks(fresh, "renew_leases(%s, %s::uuid[], %s::bigint[])", uuid4(), *named), 400
    bounds["check_lease"] = blocks(fresh, "check_lease(%s, %s)", lease.job_id, lease.lease_token), 400
    bounds["advance_job"] = (
        blocks(fresh, "advance_job(%s, %s, 'queued', 'job_validated')", lease.job_id, lease.lease_token),
        400,
    )
    bounds["reap_expired, none due"] = blocks(fresh, "reap_expired(100)"), 400
    bounds["promote_due, none due"] = blocks(fresh, "promote_due(100)"), 400
    bounds["release_jobs"] = blocks(fresh, "release_jobs(%s::uuid[], %s::bigint[])", *named), 400
    bounds["cancel_job"] = blocks(fresh, "cancel_job(%s)", lease.job_id), 400
    bounds["forget_lost_workers"] = blocks(fresh, "forget_lost_workers()"), 400
    document = add_document(admin, lease.user_id)
    bounds["enqueue_job"] = blocks(fresh, "enqueue_job(%s, %s)", document, lease.user_id), 800
    # a snooze for a hundred thousand, due far away and due now
    admin.execute(
        """
        update upload_pipeline.upload_jobs set state = 'retryable', run_at = now() + interval '1 day'
         where job_id between %s and %s and state = 'queued'
        """,
        [UUID(int=500_000), UUID(int=600_000)],
    )
    bounds["promote_due, 100,000 in the future"] = blocks(fresh, "promote_due(100)"), 400

    admin.execute("vacuum analyze upload_pipeline.upload_jobs")
    figures["a million finished, vacuumed and analysed"] = measured_claims(worker, admin)
    bounds["reap_expired, analysed"] = blocks(fresh, "reap_expired(100)"), 400
    bounds["promote_due, analysed"] = blocks(fresh, "promote_due(100)"), 400

    # a hundred thousand lanes: first all parked, then all ready
    admin.execute(
        """
        insert into upload_pipeline.lanes (pool, user_id, ready)
        select 'default', (lpad(to_hex(i + 1000000), 16, '0') || '0000000000000001')::uuid, false
          from generate_series(1, %s) i
        on conflict do nothing
        """,
        [LANES],
    )
    figures["100,000 parked lanes"] = measured_claims(worker, admin)
    admin.execute("update upload_pipeline.lanes set ready = true")
    end_claims(admin)
    add_rows(admin, 50_000_000, LANES, "queued", None)
    figures["100,000 ready lanes"] = measured_claims(worker, admin)
    print(*(f"{name}: {numbers}" for name, numbers in figures.items()), sep="\n")
    print(*(f"{name}: {seen} of at most {bound}" for name, (seen, bound) in bounds.items()), sep="\n")

    assert {name: numbers for name, numbers in figures.items() if max(numbers) > CLAIM_BOUND} == {}
    assert {name: seen for name, (seen, bound) in bounds.items() if seen > bound} == {}


def test_a_newcomers_first_job_is_claimed_within_one_turn_of_the_lanes(admin: Connection, worker: Connection) -> None:
    """Behind a hundred thousand jobs of one user and some more users, the walk comes round to the newcomer."""
    admin.execute("set session_replication_role = replica")
    add_rows(admin, 0, 100_000, "queued", HEAVY)
    add_rows(admin, 10_000_000, 40, "queued", None)
    admin.execute(
        "insert into upload_pipeline.lanes (pool, user_id) "
        "select distinct pool, user_id from upload_pipeline.upload_jobs"
    )
    admin.execute("reset session_replication_role")
    newcomer = user_number(10**9)
    document = add_document(admin, newcomer)
    cursor = claim(worker, limit=1)[-1].user_id
    worker.execute("select * from upload_pipeline.enqueue_job(%s, %s)", [document, newcomer])
    for _ in range(42):
        lease = claim_one(worker, limit=1, after=cursor)
        cursor = lease.user_id
        if cursor == newcomer:
            break
        release(worker, [lease])
    assert cursor == newcomer
