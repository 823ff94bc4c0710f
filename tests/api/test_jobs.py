"""Jobs over HTTP: status, list, retry, cancel, and that they are their owner's alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.api.batch_rows import add_batch
from tests.api.job_rows import add_job, advance, claim
from tests.api.live_service import LiveService, new_user, running_service, service_settings
from upload_pipeline.api.cursors import decode_cursor, encode_cursor
from upload_pipeline.database import queue, user_jobs
from upload_pipeline.database.as_user import as_user
from upload_pipeline.errors import PipelineError

FIELDS = {
    "job_id",
    "document_id",
    "photo_id",
    "pipeline",
    "stage",
    "state",
    "progress",
    "retry_count",
    "queued_ahead",
    "estimated_completion_at",
    "results",
    "error",
    "created_at",
    "started_at",
    "updated_at",
    "finished_at",
}


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


async def test_a_status_has_the_fields_of_the_contract(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    waiting = (await service.client(user).get(f"/api/v2/jobs/{job}")).json()
    assert waiting.keys() == FIELDS
    assert (waiting["state"], waiting["stage"], waiting["progress"]) == ("queued", "queued", 0)
    assert waiting["queued_ahead"] == 0
    assert datetime.fromisoformat(waiting["estimated_completion_at"]) > datetime.now(UTC)
    assert waiting["created_at"].endswith("Z")
    await advance(admin, await claim(admin, job), "embedded")
    done = (await service.client(user).get(f"/api/v2/jobs/{job}")).json()
    assert (done["state"], done["progress"], done["results"]) == ("done", 100, {"chunks": 3})
    assert done["queued_ahead"] is None
    assert done["estimated_completion_at"] is None
    assert done["error"] is None


async def test_a_failed_job_says_why(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    claimed = await claim(admin, job)
    await queue.fail_job(
        admin, claimed.lease, code="ENCRYPTED", message="It has a password.", retryable=False, details={"page": 1}
    )
    failed = (await service.client(user).get(f"/api/v2/jobs/{job}")).json()
    assert failed["state"] == "deadletter"
    assert failed["error"] == {"code": "ENCRYPTED", "message": "It has a password.", "details": {"page": 1}}


async def test_progress_is_finer_while_vectors_arrive(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    await advance(admin, await claim(admin, job), "embedding")
    await admin.execute("select upload_pipeline.register_model('m3', 'test', 3)")
    chunks = [uuid4() for _ in range(5)]
    await admin.executemany(
        """
        insert into upload_pipeline.document_chunk_buffer
          (document_id, user_id, ordinal, chunk_id, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
           section_ids)
        select document_id, user_id, $2, $3, 'x', repeat('a', 64), 'c', $2, $2 + 1, '{}', '{}'
          from upload_pipeline.upload_jobs where job_id = $1
        """,
        [(job, i, chunk) for i, chunk in enumerate(chunks)],
    )
    made = """
        insert into upload_pipeline.document_vector_buffer (chunk_id, embed_model, document_id, embedding)
        select chunk_id, 'm3', document_id, '[1,0,0]' from upload_pipeline.document_chunk_buffer where chunk_id = $1
    """
    paid_for = """
        insert into upload_pipeline.document_cached_chunks (document_id, embed_model, chunk_ids)
        select document_id, 'm3', array[chunk_id] from upload_pipeline.document_chunk_buffer where chunk_id = $1
    """
    seen = []
    for chunk, came in zip((None, *chunks), (None, made, paid_for, made, paid_for, paid_for), strict=True):
        if came is not None:
            await admin.execute(came, chunk)
        seen.append((await service.client(user).get(f"/api/v2/jobs/{job}")).json()["progress"])
    assert seen == [70, 71, 72, 73, 74, 75]


async def test_pages_of_a_list_show_each_job_once_newest_first(service: LiveService, admin: asyncpg.Connection) -> None:
    user, other = new_user(), new_user()
    jobs = [await add_job(admin, user) for _ in range(7)]
    await add_job(admin, other)
    # Three jobs of one moment: the id decides between them.
    await admin.execute(
        "update upload_pipeline.upload_jobs set created_at = '2026-01-01' where job_id = any($1)", jobs[2:5]
    )
    client = service.client(user)
    for limit in (1, 2, 3, 7, 100):
        seen: list[str] = []
        cursor: str | None = None
        while True:
            query = {"limit": limit} | ({"cursor": cursor} if cursor else {})
            page = (await client.get("/api/v2/jobs", params=query)).json()
            assert len(page["items"]) <= limit
            seen += [item["job_id"] for item in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        newest = [str(job) for job in (jobs[6], jobs[5], jobs[1], jobs[0], *sorted(jobs[2:5]))]
        assert seen == newest


async def test_a_job_that_is_made_between_two_pages_shifts_nothing(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    jobs = [str(await add_job(admin, user)) for _ in range(4)]
    client = service.client(user)
    first = (await client.get("/api/v2/jobs", params={"limit": 2})).json()
    await add_job(admin, user)
    second = (await client.get("/api/v2/jobs", params={"limit": 2, "cursor": first["next_cursor"]})).json()
    assert [item["job_id"] for item in first["items"] + second["items"]] == jobs[::-1]


async def test_a_list_is_restricted_by_each_filter(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    waiting, cancelled, working = [await add_job(admin, user) for _ in range(3)]
    await queue.cancel_job(admin, cancelled)
    await advance(admin, await claim(admin, working), "parsing")
    await queue.release_jobs(admin, [])
    await admin.execute(
        "update upload_pipeline.upload_jobs set created_at = '2026-01-01T00:00:00Z' where job_id = $1", cancelled
    )
    client = service.client(user)

    async def found(**query: str) -> set[UUID]:
        answer = await client.get("/api/v2/jobs", params=query)
        assert answer.status_code == 200, answer.text
        return {UUID(item["job_id"]) for item in answer.json()["items"]}

    assert await found(state="cancelled") == {cancelled}
    assert await found(stage="parsing") == {working}
    assert await found(pipeline="document") == {waiting, cancelled, working}
    assert await found(pipeline="photo") == set()
    assert await found(created_to="2026-01-02T00:00:00Z") == {cancelled}
    assert await found(created_from="2026-01-01T00:00:00Z", created_to="2026-01-01T00:00:00Z") == set()
    assert await found(created_from="2026-01-02T00:00:00+02:00") == {waiting, working}
    assert await found(batch_id=str(uuid4())) == set()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"state": "broken"}, "state"),
        ({"created_from": "yesterday"}, "created_from"),
        ({"created_from": "2026"}, "created_from"),
        ({"created_to": "-1.5"}, "created_to"),
        ({"created_from": "9999-12-31T23:59:59-23:00"}, "created_from"),
        ({"cursor": "AAAA"}, "cursor"),
        ({"cursor": "é"}, "cursor"),
        ({"batch_id": "7"}, "batch_id"),
        ({"stage": "'; drop"}, "stage"),
    ],
)
async def test_a_bad_parameter_is_named(service: LiveService, query: dict[str, str], field: str) -> None:
    answer = await service.client(new_user()).get("/api/v2/jobs", params=query)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert [item["field"] for item in error["details"]["fields"]] == [field]


@pytest.mark.parametrize(
    ("moment", "row"),
    [
        (datetime(2026, 11, 21, 9, 0, 0, 123456, tzinfo=UTC), uuid4()),
        (datetime(1969, 1, 1, tzinfo=UTC), UUID(int=0)),
        (datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), UUID(int=2**128 - 1)),
    ],
)
def test_a_cursor_gives_back_what_it_was_made_of(moment: datetime, row: UUID) -> None:
    assert decode_cursor(encode_cursor(moment, row)) == (moment, row)
    with pytest.raises(PipelineError):
        decode_cursor(encode_cursor(moment, row)[:-3] + "***")


async def test_retry_starts_ended_jobs_and_refuses_others_with_their_state(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    client = service.client(user)
    job = await add_job(admin, user)
    refused = await client.post(f"/api/v2/jobs/{job}/retry")
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "INVALID_STATE"
    assert refused.json()["error"]["details"]["state"] == "queued"
    await advance(admin, await claim(admin, job), "embedded")
    assert (await client.post(f"/api/v2/jobs/{job}/retry")).status_code == 409
    assert (await client.post(f"/api/v2/jobs/{job}/retry", json={"from_stage": "nowhere"})).status_code == 409
    assert (await client.post(f"/api/v2/jobs/{job}/retry", json={"from": "parsing"})).status_code == 400
    restarted = await client.post(f"/api/v2/jobs/{job}/retry", json={"from_stage": "parsing"})
    assert restarted.status_code == 200
    assert restarted.json() == {"job_id": str(job), "stage": "parsing", "state": "queued"}


async def test_what_follows_from_a_request_carries_its_correlation_id(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    client = service.client(user)
    job = await add_job(admin, user)
    for verb in ("cancel", "retry"):
        answer = await client.post(f"/api/v2/jobs/{job}/{verb}", headers={"X-Correlation-ID": f"my-{verb}"})
        assert answer.headers["X-Correlation-ID"] == f"my-{verb}"
    await advance(admin, await claim(admin, job), "job_validated")
    told = await admin.fetch(
        "select code::text, correlation_id from upload_pipeline.events where job_id = $1 order by event_id", job
    )
    assert [(row["code"], row["correlation_id"]) for row in told[1:]] == [
        ("job_cancelled", "my-cancel"),
        ("job_restarted", "my-retry"),
        ("job_claimed", "my-retry"),
        ("job_advanced", "my-retry"),
    ]


async def test_of_many_that_retry_at_once_one_does_and_the_others_learn_the_state_that_is(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    client = service.client(user)
    for _ in range(3):
        job = await add_job(admin, user)
        assert (await client.post(f"/api/v2/jobs/{job}/cancel")).json()["state"] == "cancelled"
        answers = await asyncio.gather(*(client.post(f"/api/v2/jobs/{job}/retry") for _ in range(8)))
        refused = [answer.json()["error"]["details"]["state"] for answer in answers if answer.status_code != 200]
        assert refused == ["queued"] * 7


async def test_cancel_stops_a_job_once_and_says_what_it_found(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    client = service.client(user)
    waiting, working, done = [await add_job(admin, user) for _ in range(3)]
    await advance(admin, await claim(admin, done), "embedded")
    lease = (await admin.fetchrow("select lease_token from upload_pipeline.upload_jobs where job_id = $1", working))[0]
    assert lease == 1  # claimed along with the other
    await admin.execute(
        """
        update upload_pipeline.upload_jobs set state = 'queued', worker_id = null, lease_expires_at = null
         where job_id = $1
        """,
        waiting,
    )
    for _ in range(2):
        answer = await client.post(f"/api/v2/jobs/{waiting}/cancel")
        assert answer.status_code == 200
        assert answer.json() == {"job_id": str(waiting), "state": "cancelled", "cancel_requested": True}
        answer = await client.post(f"/api/v2/jobs/{working}/cancel")
        assert answer.json() == {"job_id": str(working), "state": "working", "cancel_requested": True}
    refused = await client.post(f"/api/v2/jobs/{done}/cancel")
    assert refused.status_code == 409
    assert refused.json()["error"]["details"] == {"job_id": str(done), "state": "done", "stage": "embedded"}


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/retry"), ("POST", "/cancel")])
async def test_a_job_of_somebody_else_is_like_none(
    service: LiveService, admin: asyncpg.Connection, method: str, path: str
) -> None:
    job = await add_job(admin, new_user())
    stranger = service.client(new_user())
    before = await admin.fetchrow("select * from upload_pipeline.upload_jobs where job_id = $1", job)
    told = []
    for named in (job, UUID(int=job.int ^ 1)):
        answer = await stranger.request(method, f"/api/v2/jobs/{named}{path}", headers={"X-Correlation-ID": "same"})
        assert answer.status_code == 404
        told.append((answer.text.replace(str(named), ""), sorted(name for name in answer.headers)))
    assert told[0] == told[1]
    assert await admin.fetchrow("select * from upload_pipeline.upload_jobs where job_id = $1", job) == before


async def test_a_job_whose_document_is_being_deleted_is_gone(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    await admin.execute("select upload_pipeline.begin_deletion(document_id) from upload_pipeline.documents")
    client = service.client(user)
    assert (await client.get(f"/api/v2/jobs/{job}")).status_code == 404
    assert (await client.post(f"/api/v2/jobs/{job}/retry")).status_code == 404
    assert (await client.get("/api/v2/jobs")).json()["items"] == []


async def test_a_list_does_not_grow_dear_with_the_history(service: LiveService, admin: asyncpg.Connection) -> None:
    """The page is read from its index: the plan of the query under row-level security reads no more than it shows."""
    user = new_user()
    await add_job(admin, user)
    await admin.execute(
        """
        insert into upload_pipeline.upload_jobs
          (document_id, user_id, pipeline, stage, pool, state, created_at, finished_at)
        select document_id, user_id, 'document', 'embedded', 'default', 'done', now() - i * interval '1 minute', now()
          from upload_pipeline.documents, generate_series(1, 20000) i
        """
    )
    await admin.execute("analyze upload_pipeline.upload_jobs")
    batch = await add_batch(service.resources.db, user)
    await admin.execute(
        """
        insert into upload_pipeline.batch_members (batch_id, user_id, ordinal, filename, job_id)
        select $1, user_id, seq, 'a.txt', job_id from upload_pipeline.upload_jobs order by created_at limit 40
        """,
        batch,
    )
    for query, more, shown in ((user_jobs._PAGE, [], 51), (user_jobs._BATCH_PAGE, [batch], 40)):
        async with as_user(service.resources.db, user) as connection:
            for _ in range(2):  # a session's first call reads the catalog
                plan = await connection.fetchval(
                    f"explain (analyze, buffers, format json) {query}", 51, 60.0, *[None] * 7, *more
                )
        node = json.loads(plan)[0]["Plan"]
        assert node["Actual Rows"] == shown
        assert node["Shared Hit Blocks"] + node["Shared Read Blocks"] < 2_000
