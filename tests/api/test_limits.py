from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import open_api, token
from issuer import USER
from job_rows import add_job
from postgres_servers import Database

from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.rate_limits import Bucket, BucketState, count_open_jobs, forget_full_buckets, take_tokens
from upload_pipeline.settings import ENV_PREFIX, Settings, load_settings

OTHER = UUID("22222222-2222-4222-8222-222222222222")
START = datetime(2030, 1, 1, tzinfo=UTC)


async def take_at(worker: asyncpg.Connection, seconds: float, *buckets: Bucket) -> list[BucketState]:
    async with worker.transaction():
        moment = (START + timedelta(seconds=seconds)).isoformat()
        await worker.fetchval("select set_config('upload_pipeline.now', $1, true)", moment)
        return await take_tokens(worker, buckets)


async def test_a_bucket_gives_its_tokens_and_then_one_each_time_one_has_grown(worker: asyncpg.Connection) -> None:
    bucket = Bucket("b", 3, timedelta(seconds=30))
    assert [(await take_at(worker, 0, bucket))[0].remaining for _ in range(3)] == [2, 1, 0]
    (refused,) = await take_at(worker, 4, bucket)
    assert (refused.allowed, refused.remaining, refused.retry_after) == (False, 0, 6.0)
    assert refused.full_at == START + timedelta(seconds=30)
    assert (await take_at(worker, 10, bucket))[0].allowed
    assert not (await take_at(worker, 19.9, bucket))[0].allowed
    assert (await take_at(worker, 20, bucket))[0].allowed
    (rested,) = await take_at(worker, 1000, bucket)
    assert (rested.allowed, rested.remaining) == (True, 2)


@pytest.mark.parametrize(("limit", "seconds"), [(1, 60), (7, 60), (30, 86400), (1000, 3600), (999, 3600), (11, 0.001)])
async def test_a_full_bucket_holds_exactly_its_limit(worker: asyncpg.Connection, limit: int, seconds: float) -> None:
    bucket = Bucket(f"b{limit}", limit, timedelta(seconds=seconds))
    states = [(await take_at(worker, 0, bucket))[0] for _ in range(limit + 1)]
    assert [state.allowed for state in states] == [True] * limit + [False]
    assert [state.remaining for state in states] == [*range(limit - 1, -1, -1), 0]


async def test_of_several_buckets_all_give_or_none(worker: asyncpg.Connection) -> None:
    wide, narrow = Bucket("wide", 10, timedelta(hours=1)), Bucket("narrow", 1, timedelta(hours=1))
    assert [state.allowed for state in await take_at(worker, 0, wide, narrow)] == [True, True]
    for _ in range(5):
        states = await take_at(worker, 0, wide, narrow)
        assert [(state.allowed, state.remaining) for state in states] == [(True, 9), (False, 0)]
    assert (await take_at(worker, 0, wide))[0].remaining == 8


async def test_a_call_from_before_does_not_turn_the_time_back(worker: asyncpg.Connection) -> None:
    bucket = Bucket("b", 2, timedelta(seconds=20))
    await take_at(worker, 100, bucket)
    states = [(await take_at(worker, 50, bucket))[0].allowed for _ in range(3)]
    assert states.count(True) <= 1
    assert (await take_at(worker, 110, bucket))[0].allowed


@given(st.lists(st.floats(0, 40, allow_nan=False), max_size=40), st.integers(1, 5))
def test_no_more_than_the_limit_and_what_grows_is_ever_given(waits: list[float], limit: int) -> None:
    # The rule of the SQL function, on numbers: what is given in any span is at most the limit and what grew in it.
    step, full_at, now, given_at = 60 / limit, 0.0, 0.0, []
    for wait in waits:
        now += wait
        ahead = max(full_at - now, 0)
        if ahead <= 60 - step:
            full_at = now + ahead + step
            given_at.append(now)
    for index, first in enumerate(given_at):
        for count, last in enumerate(given_at[index:], 1):
            assert count <= limit + (last - first) / step + 1e-6


async def test_many_callers_at_once_get_exactly_the_tokens_that_there_are(database: Database) -> None:
    buckets = [Bucket(f"b{number}", 25, timedelta(days=1)) for number in range(3)]
    pool = await open_pool(database.worker_url, size=12)
    try:

        async def ask(turn: int) -> bool:
            # Each names the buckets in another order: they must not wait for each other in a circle.
            order = buckets[turn % 3 :] + buckets[: turn % 3]
            return all(state.allowed for state in await take_tokens(pool, order))

        answers = await asyncio.gather(*(ask(turn) for turn in range(200)))
        assert answers.count(True) == 25
    finally:
        await pool.close()


async def test_buckets_that_are_full_again_are_forgotten_and_others_are_not(worker: asyncpg.Connection) -> None:
    await take_at(worker, -3600 * 24 * 365 * 20, Bucket("old", 5, timedelta(minutes=1)))
    await take_at(worker, 0, Bucket("new", 5, timedelta(minutes=1)))
    assert await forget_full_buckets(worker) == 1
    assert await forget_full_buckets(worker) == 0
    assert (await take_at(worker, 0, Bucket("new", 5, timedelta(minutes=1))))[0].remaining == 3


async def test_open_jobs_are_counted_in_every_state_and_to_the_cap_only(
    admin: asyncpg.Connection, worker: asyncpg.Connection
) -> None:
    states = ["queued", "queued", "retryable", "working", "done", "deadletter", "cancelled"]
    for state in states:
        job = await add_job(admin, USER)
        await admin.execute(
            """
            update upload_pipeline.upload_jobs set state = $2::upload_pipeline.job_state,
                   worker_id = case when $2 = 'working' then gen_random_uuid() end,
                   lease_expires_at = case when $2 = 'working' then now() end,
                   finished_at = case when $2 in ('done', 'deadletter', 'cancelled') then now() end
             where job_id = $1
            """,
            job,
            state,
        )
    await add_job(admin, OTHER)
    assert await count_open_jobs(worker, USER, 100) == 4
    assert await count_open_jobs(worker, USER, 3) == 3
    assert await count_open_jobs(worker, OTHER, 100) == 1
    assert await count_open_jobs(worker, uuid4(), 100) == 0


async def test_a_user_who_asks_too_often_learns_for_how_long(database: Database, tmp_path: Path) -> None:
    async with open_api(database, tmp_path, limit_requests_per_hour=3) as api:
        for _ in range(3):
            assert (await api.get("/probe/me")).status_code == 200
        refused = await api.get("/probe/me")
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert error["code"] == "RATE_LIMITED"
        assert 1190 <= int(refused.headers["Retry-After"]) <= 1200
        assert refused.headers["X-RateLimit-Limit"] == "3"
        assert refused.headers["X-RateLimit-Remaining"] == "0"
        assert time.time() + 3500 < int(refused.headers["X-RateLimit-Reset"]) <= time.time() + 3601
        # each route and each user counts by itself; other processes count the same
        assert (await api.get("/probe/admin")).status_code == 200
        assert (await api.get("/probe/me", OTHER)).status_code == 200
        async with open_api(database, tmp_path, limit_requests_per_hour=3) as replica:
            assert (await replica.get("/probe/me")).status_code == 429


async def test_paths_of_one_route_count_together(database: Database, tmp_path: Path) -> None:
    async with open_api(database, tmp_path, limit_requests_per_hour=3) as api:
        answers = [(await api.get(f"/probe/number/{number}")).status_code for number in range(4)]
        assert answers == [200, 200, 200, 429]


async def test_the_status_of_one_job_is_read_ten_times_a_minute(
    database: Database, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    async with open_api(database, tmp_path, limit_status_reads_per_minute=2) as api:
        jobs = [await add_job(admin, USER) for _ in range(2)]
        path = f"/api/v2/jobs/{jobs[0]}"
        # a stranger's reads do not use up the owner's
        assert [(await api.get(path, OTHER)).status_code for _ in range(3)] == [404, 404, 429]
        answers = [(await api.get(path)).status_code for _ in range(3)]
        assert answers == [200, 200, 429]
        for spelling in (str(jobs[0]).upper(), jobs[0].hex, f"{{{jobs[0]}}}", jobs[0].urn):
            assert (await api.get(f"/api/v2/jobs/{spelling}")).status_code == 429, spelling
        assert (await api.get(f"/api/v2/jobs/{jobs[1]}")).status_code == 200


async def test_who_has_as_many_open_jobs_as_may_be_starts_no_ended_one_again(
    database: Database, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    async with open_api(database, tmp_path, limit_open_jobs=2) as api:
        first, second = [await add_job(admin, USER) for _ in range(2)]
        headers = {"Authorization": f"Bearer {token()}"}
        assert (await api.client.post(f"/api/v2/jobs/{first}/cancel", headers=headers)).status_code == 200
        third = await add_job(admin, USER)
        refused = await api.client.post(f"/api/v2/jobs/{first}/retry", headers=headers)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "TOO_MANY_OPEN_JOBS"
        assert (await api.client.post(f"/api/v2/jobs/{third}/cancel", headers=headers)).status_code == 200
        again = await api.client.post(f"/api/v2/jobs/{first}/retry", headers=headers)
        assert (again.status_code, again.json()["state"]) == (200, "queued")
        assert (await api.get(f"/api/v2/jobs/{second}")).json()["state"] == "queued"


async def test_uploads_are_counted_by_the_minute_by_the_day_and_by_the_jobs_that_are_open(
    database: Database, tmp_path: Path
) -> None:
    async def uploads(count: int, **limits: int) -> list[int]:
        async with open_api(database, tmp_path, **limits) as api:
            headers = {"Authorization": f"Bearer {token(uuid4())}"}
            answers = [
                await api.client.post(
                    "/api/v2/upload", headers=headers, files={"file": ("note.txt", f"Words of file {number}.".encode())}
                )
                for number in range(count)
            ]
        expected = "TOO_MANY_OPEN_JOBS" if "limit_open_jobs" in limits else "RATE_LIMITED"
        for answer in answers:
            if answer.status_code == 429:
                assert answer.json()["error"]["code"] == expected
                assert answer.headers["X-RateLimit-Limit"] == str(next(iter(limits.values())))
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.headers["X-RateLimit-Remaining"] == "0"
                assert int(answer.headers["X-RateLimit-Reset"]) > time.time()
        return [answer.status_code for answer in answers]

    assert await uploads(5, limit_uploads_per_minute=3) == [202, 202, 202, 429, 429]
    assert await uploads(5, limit_uploads_per_day=4) == [202, 202, 202, 202, 429]
    assert await uploads(3, limit_open_jobs=2) == [202, 202, 429]
    assert await uploads(5) == [202] * 5


async def test_an_upload_that_is_refused_counts_and_one_beyond_the_limit_is_not_read(
    database: Database, tmp_path: Path
) -> None:
    async with open_api(database, tmp_path, limit_uploads_per_minute=2) as api:
        headers = {"Authorization": f"Bearer {token()}"}
        answers = [await api.client.post("/api/v2/upload", headers=headers, content=b"none") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [415, 415, 429]

        async def never() -> AsyncIterator[bytes]:
            raise AssertionError("the body was read")
            yield b""

        headers["Content-Type"] = "multipart/form-data; boundary=b"
        headers["Content-Length"] = "10000"
        refused = await api.client.post("/api/v2/upload", headers=headers, content=never())
        assert refused.status_code == 429


def test_by_default_thirty_files_a_day_come_in_and_ten_a_minute() -> None:
    settings = load_settings()
    limits = settings.limit_uploads_per_day, settings.limit_uploads_per_minute, settings.limit_open_jobs
    assert limits == (30, 10, 500)


def test_the_documentation_names_each_limit_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        if name.startswith("limit_") and name != "limit_sessions_per_minute":  # of all users together
            assert f"| {field.default} | `{ENV_PREFIX}{name.upper()}` |" in text, name


async def test_counting_costs_the_same_however_many_buckets_and_jobs_there_are(admin: asyncpg.Connection) -> None:
    await admin.execute(
        """
        insert into upload_pipeline.rate_limits
        select 'other:' || n, now() + interval '1 hour' from generate_series(1, 50000) n
        """
    )
    await admin.execute("analyze upload_pipeline.rate_limits")
    before = await admin.fetchval("select sum(seq_tup_read) from pg_stat_user_tables where relname = 'rate_limits'")
    for number in range(20):
        await take_tokens(admin, [Bucket(f"a{number}", 5, timedelta(hours=1)), Bucket("b", 99, timedelta(hours=1))])
    await admin.execute("select pg_stat_force_next_flush()")
    after = await admin.fetchval("select sum(seq_tup_read) from pg_stat_user_tables where relname = 'rate_limits'")
    assert after - before < 50000
