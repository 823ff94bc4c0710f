"""Following a job: nothing is missed, nothing comes twice, and it ends when the job does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest

from tests.api.job_rows import add_job, advance, claim, event_ids
from tests.api.live_service import LiveService, follow, frames, new_user, running_service, service_settings, token
from upload_pipeline.api import job_feed
from upload_pipeline.api.api_keys import make_key
from upload_pipeline.database import queue

OPENING = 1.5
"""Seconds in which a stream is surely open: the first request of a service takes its time on a busy machine."""


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path, sse_heartbeat=0.2)) as running:
        yield running


async def test_the_stream_tells_the_history_then_what_happens_and_ends_with_the_job(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    claimed = await claim(admin, job)
    following = asyncio.create_task(follow(service.client(user), job))
    await asyncio.sleep(OPENING)
    assert not following.done()
    await advance(admin, claimed, "embedded")
    told = await asyncio.wait_for(following, 20)
    assert [frame.id for frame in told[:-1]] == await event_ids(admin, job)
    assert [frame.data["code"] for frame in told[:-1]] == [
        "job_enqueued",
        "job_claimed",
        *["job_advanced"] * 9,
        "job_done",
    ]
    assert told[-1].event == "end"
    assert told[-1].data == {"state": "done"}
    assert told[-2].data["progress"] == 100
    listed = (await service.client(user).get(f"/api/v2/jobs/{job}/events")).json()["items"]
    assert [frame.data for frame in told[:-1]] == listed
    assert service.resources.job_feed.watchers == 0


async def test_a_client_that_comes_back_goes_on_where_it_was(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    await advance(admin, await claim(admin, job), "embedded")
    ids = await event_ids(admin, job)
    for seen in range(len(ids) + 1):
        after = ids[seen - 1] if seen else 0
        told = await follow(service.client(user), job, after)
        assert [frame.id for frame in told[:-1]] == ids[seen:]


async def test_reconnecting_at_random_moments_gives_each_event_once(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    client = service.client(user)
    seen: list[int] = []
    ended = asyncio.Event()

    async def reader(take: int) -> None:
        """Reads so many events, then goes away in the middle of the stream."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(seen[-1] if seen else "")}
        async with client.stream("GET", f"/api/v2/jobs/{job}/events", headers=headers) as response:
            async for frame in frames(response):
                if frame.event == "end":
                    ended.set()
                    return
                if frame.id is not None:
                    seen.append(frame.id)
                    take -= 1
                if take == 0:
                    return

    async def lead() -> None:
        claimed = await claim(admin, job)
        for start, stage in zip(
            ("queued", "parsed", "chunked", "embedding"), ("parsed", "chunked", "embedding", "embedded"), strict=True
        ):
            await advance(admin, claimed, stage, start)
            await asyncio.sleep(0.05)

    leading = asyncio.create_task(lead())
    for take in (1, 2, 1, 3, 1, 1, 100):
        if not ended.is_set():
            await asyncio.wait_for(reader(take), 20)
    await leading
    assert seen == await event_ids(admin, job)


async def test_many_watchers_of_one_job_cost_one_look_and_all_see_all(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    followers = [asyncio.create_task(follow(service.client(user), job)) for _ in range(20)]
    while service.resources.job_feed.watchers < 20:
        await asyncio.sleep(0.01)
    backends = await admin.fetchval(
        "select count(*) from pg_stat_activity where application_name = 'upload-pipeline serve'"
    )
    assert backends <= service.settings.pool_size
    await advance(admin, await claim(admin, job), "embedded")
    ids = await event_ids(admin, job)
    for told in await asyncio.gather(*followers):
        assert [frame.id for frame in told[:-1]] == ids


async def test_a_client_behind_what_is_kept_reads_the_rest_from_the_database(
    service: LiveService, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_feed, "KEPT_EVENTS", 2)
    monkeypatch.setattr(job_feed, "EVENTS_OF_A_LOOK", 3)
    user = new_user()
    job = await add_job(admin, user)
    await advance(admin, await claim(admin, job), "embedding")
    first = asyncio.create_task(follow(service.client(user), job))
    await asyncio.sleep(0.3)
    second = asyncio.create_task(follow(service.client(user), job))
    await asyncio.sleep(0.1)
    await queue.cancel_job(admin, job)
    await admin.execute("select upload_pipeline.reap_expired()")
    await admin.execute("update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 hour'")
    await admin.execute("select upload_pipeline.reap_expired()")
    ids = await event_ids(admin, job)
    for told in await asyncio.wait_for(asyncio.gather(first, second), 20):
        assert [frame.id for frame in told[:-1]] == ids
        assert told[-1].data == {"state": "cancelled"}


async def test_a_job_that_starts_again_is_followed_again(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    await queue.cancel_job(admin, job)
    client = service.client(user)
    assert (await follow(client, job))[-1].data == {"state": "cancelled"}
    assert (await client.post(f"/api/v2/jobs/{job}/retry")).status_code == 200
    following = asyncio.create_task(follow(client, job))
    await asyncio.sleep(OPENING)
    assert not following.done()
    await advance(admin, await claim(admin, job), "embedded")
    assert (await asyncio.wait_for(following, 20))[-1].data == {"state": "done"}


async def test_silence_is_broken_by_comments(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    headers = {"Accept": "text/event-stream"}
    async with service.client(user).stream("GET", f"/api/v2/jobs/{job}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        beats = 0
        async for line in response.aiter_lines():
            beats += line == ": heart-beat"
            if beats == 3:
                break


async def test_a_deleted_job_ends_its_stream(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    following = asyncio.create_task(follow(service.client(user), job))
    await asyncio.sleep(OPENING)
    await admin.execute("delete from upload_pipeline.documents")
    told = await asyncio.wait_for(following, 20)
    assert told[-1].event == "end"
    assert told[-1].data == {"state": None}


async def test_streams_survive_the_loss_of_all_database_connections(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    following = asyncio.create_task(follow(service.client(user), job))
    await asyncio.sleep(OPENING)
    await admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'upload-pipeline serve'"
    )
    await advance(admin, await claim(admin, job), "embedded")
    told = await asyncio.wait_for(following, 30)
    assert [frame.id for frame in told[:-1]] == await event_ids(admin, job)


async def test_closing_the_feed_ends_open_streams(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    headers = {"Accept": "text/event-stream"}
    async with service.client(user).stream("GET", f"/api/v2/jobs/{job}/events", headers=headers) as response:
        told = frames(response)
        while (await anext(told)).data is None:
            pass
        service.resources.job_feed.close()
        async with asyncio.timeout(10):
            assert [frame async for frame in told if frame.event] == []


async def test_a_stream_ends_in_time_and_its_client_resumes(
    database: Any, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    settings = service_settings(database.worker_url, tmp_path, sse_seconds=0.3, sse_heartbeat=0.1, sse_retry=0.05)
    async with running_service(settings) as service:
        first = await follow(service.client(user), job)
        assert [frame.data["code"] for frame in first] == ["job_enqueued"]
        await advance(admin, await claim(admin, job), "embedded")
        second = await follow(service.client(user), job, first[-1].id)
    assert [frame.id for frame in (*first, *second[:-1])] == await event_ids(admin, job)


@pytest.mark.parametrize("credentials", ["token", "api key"])
async def test_a_stream_does_not_outlive_its_credentials(
    service: LiveService, admin: asyncpg.Connection, credentials: str
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    if credentials == "token":
        headers = {"Authorization": f"Bearer {token(user, exp=int(time.time()) + 2)}"}
        ends = int(time.time()) + 2.0
    else:
        key = make_key()
        ends = time.time() + 1
        await admin.execute(
            "select upload_pipeline.create_api_key($1, $2, $3, 'test', '{}', $4)",
            key.prefix,
            key.key_sha256,
            user,
            datetime.fromtimestamp(ends, UTC),
        )
        headers = {"X-API-Key": key.key}
    client = service.client(**headers)
    told = await asyncio.wait_for(follow(client, job), 10)
    assert [frame.data["code"] for frame in told] == ["job_enqueued"]
    assert -1 < time.time() - ends < 3
    # the one who comes back has to show others, and misses nothing
    if credentials == "api key":
        assert (await client.get(f"/api/v2/jobs/{job}/events")).status_code == 401
    await queue.cancel_job(admin, job)
    assert (await follow(service.client(user), job, told[-1].id))[-1].data == {"state": "cancelled"}


@pytest.mark.parametrize("limit", ["sse_streams_per_user", "sse_streams"])
async def test_streams_beyond_the_cap_are_refused_until_one_ends(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, limit: str
) -> None:
    one, other = new_user(), new_user()
    jobs = {user: await add_job(admin, user) for user in (one, other)}
    last = one if limit == "sse_streams_per_user" else other
    async with running_service(service_settings(database.worker_url, tmp_path, **{limit: 2})) as service:
        streams = service.resources.streams
        following = [asyncio.create_task(follow(service.client(one), jobs[one])) for _ in range(2)]
        async with asyncio.timeout(10):
            while len(streams) < 2:
                await asyncio.sleep(0.01)
        client = service.client(last)
        refused = await client.get(f"/api/v2/jobs/{jobs[last]}/events", headers={"Accept": "text/event-stream"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "TOO_MANY_STREAMS"
        assert (refused.headers["X-RateLimit-Limit"], refused.headers["X-RateLimit-Remaining"]) == ("2", "0")
        assert int(refused.headers["Retry-After"]) > 0
        assert int(refused.headers["X-RateLimit-Reset"]) > time.time()
        # the history as JSON is no stream; nor does a stream of no job keep a place
        assert (await client.get(f"/api/v2/jobs/{jobs[last]}/events")).status_code == 200
        if limit == "sse_streams_per_user":
            missing = await service.client(other).get(
                f"/api/v2/jobs/{jobs[one]}/events", headers={"Accept": "text/event-stream"}
            )
            assert missing.status_code == 404
        following[0].cancel()
        async with asyncio.timeout(10):
            while len(streams) > 1:
                await asyncio.sleep(0.01)
        following.append(asyncio.create_task(follow(client, jobs[last])))
        async with asyncio.timeout(10):
            while len(streams) < 2:
                await asyncio.sleep(0.01)
        for job in jobs.values():
            await queue.cancel_job(admin, job)
        for task in following[1:]:
            assert (await asyncio.wait_for(task, 10))[-1].data == {"state": "cancelled"}
        async with asyncio.timeout(10):
            while len(streams):
                await asyncio.sleep(0.01)


async def test_a_client_that_leaves_is_forgotten(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    headers = {"Accept": "text/event-stream"}
    async with service.client(user).stream("GET", f"/api/v2/jobs/{job}/events", headers=headers) as response:
        await anext(response.aiter_lines())
        assert service.resources.job_feed.watchers == 1
    async with asyncio.timeout(10):
        while service.resources.job_feed.watchers:
            await asyncio.sleep(0.01)


async def test_a_client_that_does_not_read_holds_no_memory_and_misses_nothing(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    host, port = service.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    request = f"GET /api/v2/jobs/{job}/events HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
    writer.write(f"{request}Authorization: Bearer {token(user)}\r\nConnection: close\r\n\r\n".encode())
    await asyncio.sleep(OPENING)
    # 12 MB: more than the sockets between take
    await admin.execute(
        """
        insert into upload_pipeline.events (at, code, user_id, job_id, payload)
        select now(), 'job_advanced', $1, $2, jsonb_build_object('filler', repeat('x', 6000))
          from generate_series(1, 2000)
        """,
        user,
        job,
    )
    feed = service.resources.job_feed
    await asyncio.sleep(1.5)
    tail = feed._tails[job]
    assert tail.last == (await event_ids(admin, job))[-1]
    assert len(tail.frames) <= job_feed.KEPT_EVENTS
    await queue.cancel_job(admin, job)
    told = [int(line[4:]) async for line in reader_lines(reader) if line.startswith(b"id: ")]
    writer.close()
    assert told == await event_ids(admin, job)


async def reader_lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a connection until its end, however long."""
    left = b""
    while data := await reader.read(65536):
        *lines, left = (left + data).split(b"\n")
        for line in lines:
            yield line


async def test_history_comes_as_json_page_by_page(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    await advance(admin, await claim(admin, job), "embedded")
    client = service.client(user)
    ids: list[int] = []
    cursor: str | None = None
    while True:
        query = {"limit": "5"} | ({"cursor": cursor} if cursor else {})
        page = (await client.get(f"/api/v2/jobs/{job}/events", params=query)).json()
        ids += [item["event_id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert ids == await event_ids(admin, job)


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_others_and_nobody_see_no_job(service: LiveService, admin: asyncpg.Connection, accept: str) -> None:
    job = await add_job(admin, new_user())
    answers: list[httpx.Response] = []
    for path_id in (job, uuid4()):
        answer = await service.client(new_user()).get(f"/api/v2/jobs/{path_id}/events", headers={"Accept": accept})
        assert answer.status_code == 404
        answers.append(answer)
    told = [a.text.replace(a.json()["error"]["correlation_id"], "").replace(str(a.request.url), "") for a in answers]
    assert told[0].replace(str(job), "") == told[1].replace(answers[1].json()["error"]["details"]["job_id"], "")
    assert (await service.client().get(f"/api/v2/jobs/{job}/events")).status_code == 401


@pytest.mark.parametrize("last", ["-1", "x", "1" * 19, "1.5"])
async def test_a_last_event_id_that_is_none_is_refused(
    service: LiveService, admin: asyncpg.Connection, last: str
) -> None:
    user = new_user()
    job = await add_job(admin, user)
    answer = await service.client(user).get(
        f"/api/v2/jobs/{job}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": last}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["fields"][0]["field"] == "Last-Event-ID"


async def test_an_id_from_the_future_hides_nothing(service: LiveService, admin: asyncpg.Connection) -> None:
    user = new_user()
    job = await add_job(admin, user)
    following = asyncio.create_task(follow(service.client(user), job, after=10**15))
    await asyncio.sleep(OPENING)
    claimed = await claim(admin, job)
    await advance(admin, claimed, "embedded")
    told = await asyncio.wait_for(following, 20)
    assert [frame.id for frame in told[:-1]] == (await event_ids(admin, job))[1:]
