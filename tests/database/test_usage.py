"""What was used: counted once, at the day's price, in the job's own results, and read by whom it concerns."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest
from sessions import Connect, Connection
from verbs import (
    add_job,
    advance,
    advance_to,
    await_lock_wait,
    cancel,
    claim_one,
    fail,
    in_background,
    job_row,
    reap,
    release,
    retry,
    set_clock,
    snooze,
    user_number,
    value,
)

from upload_pipeline.database.connection import connect as connect_async
from upload_pipeline.database.usage import Grouping, Usage, UsageSum, record_usage, sum_usage
from upload_pipeline.prices import cost_micros

PRICES = {"hosted/m": {"tokens": 0.02}, "hosted/pages": {"pages": 3.75, "credits": 1.25, "requests": 1}}


@pytest.fixture
async def usage_db(database: Any) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect_async(database.worker_url)
    yield connection
    await connection.close()


def used(**changes: Any) -> Usage:
    return replace(Usage(uuid4(), "hosted", "m", "embed", requests=1, tokens=1000), **changes)


def job_results(admin: Connection, job: UUID) -> Any:
    return value(admin, "select results from upload_pipeline.job_outcomes where job_id = %s", job)


def rows(admin: Connection) -> list[Any]:
    return admin.execute("select * from upload_pipeline.usage_records order by at, usage_id").fetchall()


# prices


@pytest.mark.parametrize(
    ("model", "units", "cost"),
    [
        ("m", {"tokens": 5}, "0.1"),
        ("m", {"tokens": 3_000_000}, "60000"),
        ("m", {"pages": 7}, "0"),
        ("pages", {"pages": 2, "credits": Decimal("1.5"), "requests": 1}, "10375"),
        ("unknown", {"tokens": 1}, None),
        ("unknown", {}, "0"),
    ],
)
def test_a_use_costs_what_the_table_says(model: str, units: dict[str, Any], cost: str | None) -> None:
    none: dict[str, Any] = {"tokens": 0, "pages": 0, "requests": 0, "credits_taken": Decimal(0)}
    given = {**none, **{("credits_taken" if unit == "credits" else unit): count for unit, count in units.items()}}
    assert cost_micros(PRICES, provider="hosted", model=model, **given) == (None if cost is None else Decimal(cost))


def test_a_price_of_a_model_holds_for_its_versions_that_have_none_of_their_own() -> None:
    table = {"hosted/tier": {"pages": 1}, "hosted/tier/2026-10-16": {"pages": 2}}
    used = {"tokens": 0, "pages": 1000, "credits_taken": Decimal(0), "requests": 1}

    def cost(model: str) -> Decimal | None:
        return cost_micros(table, provider="hosted", model=model, **used)  # type: ignore[arg-type]

    assert (cost("tier/2026-09-28"), cost("tier/2026-10-16"), cost("tier")) == (1_000_000, 2_000_000, 1_000_000)
    assert (cost("other/2026-09-28"), cost("tier2")) == (None, None)


def test_what_is_local_costs_nothing_unless_it_has_a_price() -> None:
    units: dict[str, Any] = {"tokens": 10, "pages": 0, "requests": 1, "credits_taken": Decimal(0)}
    assert cost_micros({}, provider="local", model="m", **units) == 0
    assert cost_micros({"local/m": {"tokens": 1}}, provider="local", model="m", **units) == 10


# recording


async def test_a_record_has_its_jobs_user_and_document_and_the_days_price(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection
) -> None:
    job = add_job(admin, worker, user_number(1))
    assert await record_usage(usage_db, [used(job_id=job, user_id=user_number(9), document_id=uuid4())], PRICES) == 1
    (row,) = rows(admin)
    document = value(admin, "select document_id from upload_pipeline.upload_jobs where job_id = %s", job)
    assert (row.user_id, row.document_id, row.cost_micros) == (user_number(1), document, 20)
    assert await record_usage(usage_db, [], PRICES) == 0


async def test_recording_again_counts_once(usage_db: asyncpg.Connection, admin: Connection) -> None:
    first, second, third = used(), used(), used()
    assert await record_usage(usage_db, [first, second], PRICES) == 2
    assert await record_usage(usage_db, [third, second], PRICES) == 1
    assert await record_usage(usage_db, [third], {}) == 0
    assert {row.usage_id for row in rows(admin)} == {first.usage_id, second.usage_id, third.usage_id}
    assert {row.cost_micros for row in rows(admin)} == {20}


async def test_a_bad_record_undoes_the_whole_call(usage_db: asyncpg.Connection, admin: Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await record_usage(usage_db, [used(), used(tokens=-1)], PRICES)
    with pytest.raises(asyncpg.CheckViolationError):
        await record_usage(usage_db, [used(provider="")], PRICES)
    assert rows(admin) == []


async def test_usage_outlives_its_job(usage_db: asyncpg.Connection, admin: Connection, worker: Connection) -> None:
    job = add_job(admin, worker)
    await record_usage(usage_db, [used(job_id=job)], PRICES)
    admin.execute("delete from upload_pipeline.documents")
    assert [row.job_id for row in rows(admin)] == [job]
    assert await record_usage(usage_db, [used(job_id=job, user_id=user_number(4))], PRICES) == 1
    assert rows(admin)[-1].user_id == user_number(4)


# a job's own cost


async def test_a_job_that_fails_for_good_tells_its_cost_and_a_retry_adds_to_it(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection
) -> None:
    job = add_job(admin, worker)
    lease = claim_one(worker)
    await record_usage(usage_db, [used(job_id=job), used(job_id=job, requests=0, tokens=0, cached=3)], PRICES)
    assert value(admin, "select count(*) from upload_pipeline.job_outcomes") == 0
    fail(worker, lease, retryable=False)
    cost = {"usd": 0.00002, "requests": 1, "tokens": 1000, "pages": 0, "cached": 3}
    assert job_results(admin, job) == {"cost": cost}
    # it comes late: the call was under way when the job ended
    await record_usage(usage_db, [used(job_id=job, tokens=500)], PRICES)
    assert job_results(admin, job) == {"cost": cost | {"usd": 0.00003, "requests": 2, "tokens": 1500}}

    retry(worker, job)
    assert value(admin, "select count(*) from upload_pipeline.job_outcomes") == 0
    fail(worker, claim_one(worker), retryable=False)
    assert job_results(admin, job)["cost"]["requests"] == 2


async def test_a_failure_that_is_tried_again_has_no_results_yet(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection
) -> None:
    job = add_job(admin, worker)
    lease = claim_one(worker)
    await record_usage(usage_db, [used(job_id=job)], PRICES)
    fail(worker, lease, retryable=True)
    assert job_results(admin, job) is None


async def test_a_job_without_usage_has_no_cost(admin: Connection, worker: Connection) -> None:
    job = add_job(admin, worker)
    fail(worker, claim_one(worker), retryable=False)
    assert job_results(admin, job) is None
    assert value(admin, "select upload_pipeline.job_cost(%s)", job) == {}


async def test_a_job_whose_worker_is_lost_tells_its_cost(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection
) -> None:
    set_clock(worker)
    job = add_job(admin, worker)
    claim_one(worker)
    await record_usage(usage_db, [used(job_id=job)], PRICES)
    admin.execute("update upload_pipeline.upload_jobs set retry_count = 3")
    set_clock(worker, 100)
    assert value(worker, "select upload_pipeline.reap_expired()") == 1
    assert job_results(admin, job)["cost"]["tokens"] == 1000


def _cancel_where_nobody_works(worker: Connection, lease: Any) -> None:
    snooze(worker, lease)
    cancel(worker, lease.job_id)


def _cancel_and_release(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    release(worker, [lease])


def _cancel_and_snooze(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    snooze(worker, lease)


def _cancel_and_lose_the_worker(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    set_clock(worker, 100)
    assert reap(worker) == 1


def _cancel_and_end_the_step(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    advance(worker, lease, "queued", "job_validated")


def _cancel_and_end_the_step_with_results(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    assert advance(worker, lease, "queued", "job_validated", results='{"pages": 3}').state == "cancelled"


def _cancel_and_fail(worker: Connection, lease: Any) -> None:
    cancel(worker, lease.job_id)
    fail(worker, lease)


@pytest.mark.parametrize(
    "end",
    [
        _cancel_where_nobody_works,
        _cancel_and_release,
        _cancel_and_snooze,
        _cancel_and_lose_the_worker,
        _cancel_and_end_the_step,
        _cancel_and_end_the_step_with_results,
        _cancel_and_fail,
    ],
)
async def test_a_cancelled_job_tells_its_cost(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection, end: Callable[[Connection, Any], None]
) -> None:
    set_clock(worker)
    job = add_job(admin, worker)
    lease = claim_one(worker)
    await record_usage(usage_db, [used(job_id=job)], PRICES)
    end(worker, lease)
    assert job_row(admin, job).state == "cancelled"
    assert job_results(admin, job)["cost"]["requests"] == 1
    # what comes late as well
    await record_usage(usage_db, [used(job_id=job)], PRICES)
    assert job_results(admin, job)["cost"]["requests"] == 2


async def test_what_comes_late_is_told_of_a_job_that_had_used_nothing(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    job = add_job(admin, worker, user)
    lease = claim_one(worker)
    cancel(worker, job)
    release(worker, [lease])
    assert value(admin, "select count(*) from upload_pipeline.job_outcomes") == 0
    await record_usage(usage_db, [used(job_id=job)], PRICES)
    assert job_results(admin, job)["cost"]["requests"] == 1
    row = admin.execute("select user_id, error_code from upload_pipeline.job_outcomes").fetchone()
    assert tuple(row or ()) == (user, None)


async def test_a_job_that_is_cancelled_while_it_waits_for_a_retry_keeps_its_error_beside_its_cost(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection
) -> None:
    job = add_job(admin, worker)
    lease = claim_one(worker)
    await record_usage(usage_db, [used(job_id=job)], PRICES)
    fail(worker, lease)
    cancel(worker, job)
    row = admin.execute("select error_code, results from upload_pipeline.job_outcomes").fetchone()
    assert row is not None
    assert (row.error_code, row.results["cost"]["requests"]) == ("PARSER_FAILED", 1)


async def test_a_cost_is_unknown_where_a_part_of_it_is(
    usage_db: asyncpg.Connection, admin: Connection, worker: Connection
) -> None:
    job = add_job(admin, worker)
    lease = claim_one(worker)
    await record_usage(usage_db, [used(job_id=job), used(job_id=job, model="unknown")], PRICES)
    fail(worker, lease, retryable=False)
    assert job_results(admin, job) == {
        "cost": {"usd": None, "requests": 2, "tokens": 2000, "pages": 0, "cached": 0}
    }  # fmt: skip


def record(db: Connection, job: UUID) -> None:
    one = {"usage_id": str(uuid4()), "job_id": str(job), "provider": "p", "model": "m", "operation": "o", "requests": 1}
    db.execute("select upload_pipeline.record_usage(%s)", [json.dumps([one])])


def test_what_is_recorded_while_the_job_ends_is_in_its_cost(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    other = connect()
    # the record first: the end waits, and counts it
    job = add_job(admin, worker)
    lease = claim_one(worker)
    with other.transaction():
        record(other, job)
        ending = in_background(fail, worker, lease, retryable=False)
        await_lock_wait(admin, worker)
    ending.result(10)
    assert job_results(admin, job)["cost"]["requests"] == 1
    # the end first: the record waits, and sees that the job has ended
    job = add_job(admin, worker)
    lease = claim_one(worker)
    with worker.transaction():
        fail(worker, lease, retryable=False)
        recording = in_background(record, other, job)
        await_lock_wait(admin, other)
    recording.result(10)
    assert job_results(admin, job)["cost"]["requests"] == 1


@pytest.mark.parametrize("cancelled", [False, True])
def test_two_that_record_for_an_ended_job_at_once_are_both_in_its_cost(
    admin: Connection, worker: Connection, connect: Connect, cancelled: bool
) -> None:
    other = connect()
    job = add_job(admin, worker)
    if cancelled:
        cancel(worker, job)
    else:
        fail(worker, claim_one(worker), retryable=False)
    with other.transaction():
        record(other, job)
        recording = in_background(record, worker, job)
        await_lock_wait(admin, worker)
    recording.result(10)
    assert job_results(admin, job)["cost"]["requests"] == 2


def test_a_done_jobs_cost_stands_beside_its_counts(admin: Connection, worker: Connection) -> None:
    job = add_job(admin, worker)
    lease = claim_one(worker)
    advance_to(worker, lease, "embeddings_buffered")
    results = json.dumps({"chunks": 2})
    worker.execute(
        "select upload_pipeline.advance_job(%s, %s, 'embeddings_buffered', 'embedded', false, '60 s', %s)",
        [lease.job_id, lease.lease_token, results],
    )
    record(worker, job)
    found = job_results(admin, job)
    assert (found["chunks"], found["cost"]["requests"]) == (2, 1)


# reading


async def test_usage_is_summed_by_day_model_and_user(
    database: Any, usage_db: asyncpg.Connection, admin: Connection
) -> None:
    mine, yours = user_number(1), user_number(2)
    at = datetime(2031, 5, 17, 23, 30, tzinfo=UTC)
    for hours, user, model, tokens in (
        (0, mine, "m", 1000),
        (1, mine, "m", 2000),
        (1, yours, "x", 5),
        (30, yours, "m", 10**6),
    ):
        await usage_db.execute(f"set upload_pipeline.now = '{(at + timedelta(hours=hours)).isoformat()}'")
        await record_usage(usage_db, [used(user_id=user, model=model, tokens=tokens)], PRICES)

    with psycopg.connect(database.worker_url) as db:

        def sums(by: Grouping, **options: Any) -> list[tuple[str, int, Decimal | None, int]]:
            return [(one.key, one.tokens, one.cost_usd, one.unpriced) for one in sum_usage(db, by=by, **options)]

        assert sums("day") == [
            ("2031-05-19", 10**6, Decimal("0.02"), 0),
            ("2031-05-18", 2005, Decimal("0.00004"), 1),
            ("2031-05-17", 1000, Decimal("0.00002"), 0),
        ]
        assert sums("model") == [("hosted/m", 1_003_000, Decimal("0.02006"), 0), ("hosted/x", 5, None, 1)]
        assert [key for key, *_ in sums("user")] == [str(yours), str(mine)]
        assert sums("day", user_id=mine, begin=at + timedelta(hours=1), end=at + timedelta(hours=2)) == [
            ("2031-05-18", 2000, Decimal("0.00004"), 0)
        ]
        assert sums("day", end=at) == []
        assert sum_usage(db, by="model", limit=1) == [
            UsageSum("hosted/m", 3, 1_003_000, 0, Decimal(0), 0, Decimal("0.02006"), 0)
        ]

    def viewed(view: str, key: str) -> list[Any]:
        asked = f"{key}, model, tokens::integer, cost_micros, unpriced from upload_pipeline.{view} order by 1, 2"
        # a day is UTC's, wherever the reader is
        admin.execute("set timezone = 'Asia/Tokyo'")
        return admin.execute(f"select {asked}").fetchall()

    assert viewed("usage_by_day", "day::text") == [
        ("2031-05-17", "m", 1000, 20, 0),
        ("2031-05-18", "m", 2000, 40, 0),
        ("2031-05-18", "x", 5, None, 1),
        ("2031-05-19", "m", 10**6, 20_000, 0),
    ]
    assert viewed("usage_by_user", "user_id") == [
        (mine, "m", 3000, 60, 0),
        (yours, "m", 10**6, 20_000, 0),
        (yours, "x", 5, None, 1),
    ]
    assert viewed("usage_by_model", "users") == [(1, "x", 5, None, 1), (2, "m", 1_003_000, 20_060, 0)]


async def test_a_user_reads_own_usage_and_an_operator_all(usage_db: asyncpg.Connection, admin: Connection) -> None:
    for number in (1, 2):
        await record_usage(usage_db, [used(user_id=user_number(number), tokens=number)], PRICES)
    with admin.transaction(force_rollback=True):
        admin.execute("set local role authenticated")
        admin.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(user_number(2))})])
        for view in ("usage_by_user", "usage_by_day", "usage_by_model"):
            assert value(admin, f"select sum(tokens)::integer from upload_pipeline.{view}") == 2
    assert await usage_db.fetchval("select sum(tokens) from upload_pipeline.usage_by_model") == 3
