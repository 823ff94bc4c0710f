from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from in_process import Api, open_api, token
from issuer import ISSUER, SECRET, USER
from job_rows import add_job, claim
from postgres_servers import Database
from prometheus_client.parser import text_string_to_metric_families

import upload_pipeline.api.metrics as service_metrics
import upload_pipeline.database.queue_metrics as queue_metrics
from upload_pipeline.api import server
from upload_pipeline.api.app import create_app
from upload_pipeline.api.server import running_service
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import Settings, load_settings


def settings_of(database: Database, home: Path, **given: Any) -> Settings:
    return load_settings(
        **(
            {"home": home, "database_url": database.worker_url, "jwt_issuer": ISSUER, "jwt_secret": SECRET}
            | {"api_port": 0, "pool_size": 4, "api_shutdown_grace": 10.0}
            | given
        )
    )


async def test_a_service_whose_parts_work_is_ready(api: Api) -> None:
    answer = await api.client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "checks": dict.fromkeys(("database", "migrations", "storage"), "ok")}


async def test_a_service_without_a_migration_is_not_ready(api: Api, admin: asyncpg.Connection) -> None:
    await admin.execute("delete from supabase_migrations.schema_migrations")
    answer = await api.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"] == {"database": "ok", "migrations": "MIGRATIONS_PENDING", "storage": "ok"}


async def test_a_service_without_its_database_is_not_ready_and_alive(api: Api) -> None:
    await api.resources.db.close()
    answers = await asyncio.gather(*(api.client.get("/readyz") for _ in range(5)))
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["checks"]["database"] == "DATABASE_UNAVAILABLE"
    assert (await api.client.get("/healthz")).status_code == 200
    metrics = (await api.client.get("/metrics")).text
    assert "upload_pipeline_database_up 0.0" in metrics
    refused = await api.get("/probe/me")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "DATABASE_UNAVAILABLE")


async def test_a_service_that_cannot_store_is_not_ready(database: Database, tmp_path: Path) -> None:
    async with open_api(database, tmp_path) as api:
        (tmp_path / "storage").rename(tmp_path / "away") if (tmp_path / "storage").exists() else None
        (tmp_path / "storage").write_text("a file where the folder was")
        answer = await api.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["checks"]["storage"] in ("STORAGE_DENIED", "STORAGE_UNAVAILABLE")
        assert str(tmp_path) not in answer.text


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_tell_of_requests_by_route_and_of_the_queue(
    api: Api, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_metrics, "LAG_SECONDS", 0)
    monkeypatch.setattr(service_metrics, "LOOK_SECONDS", 0.0)
    await api.client.get("/metrics")
    for number in (1, 2):
        await api.get(f"/probe/number/{number}")
    await api.client.get("/api/v2/somewhere/else")
    await api.client.request("BREW", "/healthz")
    jobs = [await add_job(admin, USER) for _ in range(3)]
    await claim(admin, jobs[0])
    await admin.execute(
        "select upload_pipeline.record_event('job_failed'), upload_pipeline.record_event('job_deadlettered')"
    )
    await admin.execute("select upload_pipeline.record_fenced_write($1, 1, $1)", jobs[1])
    await (await api.resources.query_models.current()).embed("a query", user_id=USER)
    answer = await api.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)

    def one(name: str, **labels: str) -> float:
        return found[f"upload_pipeline_{name}", frozenset(labels.items())]

    assert one("http_requests_total", method="GET", route="/probe/number/{number}", status="200") == 2
    assert one("http_requests_total", method="GET", route="unmatched", status="404") == 1
    assert one("http_requests_total", method="other", route="/healthz", status="405") == 1
    assert one("http_request_seconds_count", method="GET", route="/probe/number/{number}") == 2
    queued = sum(
        value
        for (name, labels), value in found.items()
        if name == "upload_pipeline_jobs" and ("state", "queued") in labels
    )
    working = sum(
        value
        for (name, labels), value in found.items()
        if name == "upload_pipeline_jobs" and ("state", "working") in labels
    )
    assert queued + working == 3
    assert working >= 1
    assert one("events_total", code="job_enqueued") == 3
    assert one("events_total", code="job_claimed") == working
    assert one("claim_seconds_count") == working
    assert one("job_retries_total") == 1
    assert one("dead_letters_total") == 1
    assert one("fenced_writes_total") == 1
    assert one("provider_calls_total", provider="local", operation="embed", outcome="ok") == 1
    assert one("provider_units_total", provider="local", operation="embed", unit="texts") == 1
    assert one("provider_seconds_count", provider="local", operation="embed") == 1
    assert one("event_streams") == 0
    assert one("event_notifications") in (0, 1)
    assert one("oldest_ready_seconds") >= 0
    # a second look counts nothing twice
    again = samples((await api.client.get("/metrics")).text)
    assert again["upload_pipeline_events_total", frozenset({("code", "job_enqueued")})] == 3


async def test_uploads_are_counted_by_what_became_of_them() -> None:
    measured = service_metrics.ServiceMetrics()
    for status in (202, 202, 200, 413, 500, 0):
        measured.observe_request("POST", "/api/v2/upload", status, 0.1, "multipart/form-data; boundary=x")
    measured.observe_request("POST", "/api/v2/upload", 202, 0.1, "application/json")
    counts = {
        (sample.labels["mode"], sample.labels["outcome"]): sample.value
        for family in measured.registry.collect()
        for sample in family.samples
        if sample.name == "upload_pipeline_uploads_total"
    }
    assert counts == {
        ("multipart", "accepted"): 2,
        ("multipart", "duplicate"): 1,
        ("multipart", "refused"): 1,
        ("multipart", "failed"): 1,
        ("multipart", "aborted"): 1,
        ("json", "accepted"): 1,
    }


async def refused_start(settings: Settings, url: str) -> PipelineError:
    with pytest.raises(PipelineError) as raised:
        async with running_service(settings, url):
            pass
    return raised.value


async def test_a_service_that_could_not_work_does_not_start(
    database: Database, empty_database: Database, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    bare = await refused_start(settings_of(empty_database, tmp_path), empty_database.worker_url)
    assert bare.code is ErrorCode.MIGRATIONS_PENDING
    nowhere = "postgresql://upload_worker@127.0.0.1:1/d"
    away = await refused_start(settings_of(database, tmp_path, connect_timeout=1.0), nowhere)
    assert away.code is ErrorCode.DATABASE_UNAVAILABLE
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = await refused_start(settings_of(database, tmp_path, api_port=port), database.worker_url)
        assert error.code is ErrorCode.SETTING_INVALID
        assert f"127.0.0.1:{port}" in error.message
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder would be")
    storage = await refused_start(settings_of(database, tmp_path, storage_url=f"file://{blocked}"), database.worker_url)
    assert storage.code in (ErrorCode.STORAGE_DENIED, ErrorCode.STORAGE_UNAVAILABLE, ErrorCode.SETTING_INVALID)
    await admin.execute("delete from supabase_migrations.schema_migrations")
    behind = await refused_start(settings_of(database, tmp_path), database.worker_url)
    assert behind.code is ErrorCode.MIGRATIONS_PENDING


async def test_a_service_that_stops_lets_uploads_end_and_takes_no_more(
    database: Database, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    begun, go_on = {"multipart": asyncio.Event(), "bytes": asyncio.Event()}, asyncio.Event()
    head = {"Authorization": f"Bearer {token()}"}
    text = b"words and words " * 20_000
    announced = {"filename": "a.txt", "bytes_len": len(text), "mime": "text/plain"}

    async def slowly(data: bytes, name: str) -> Any:
        yield data[:100_000]
        begun[name].set()
        await go_on.wait()
        yield data[100_000:]

    async with asyncio.timeout(60), httpx.AsyncClient(timeout=30) as client:
        running = running_service(settings_of(database, tmp_path), database.worker_url)
        service = await running.__aenter__()
        digest = hashlib.sha256(text).hexdigest()
        told = await client.post(f"{service.url}/api/v2/upload", headers=head, json={**announced, "sha256": digest})
        form = (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="b.txt"\r\n\r\nmore ' + text + b"\r\n--b--"
        )
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        uploads = {
            "multipart": client.post(
                f"{service.url}/api/v2/upload", headers={**head, **kind}, content=slowly(form, "multipart")
            ),
            "bytes": client.put(
                told.json()["upload_url"],
                headers={"Content-Type": "text/plain", "Content-Length": str(len(text))},
                content=slowly(text, "bytes"),
            ),
        }
        sending = [asyncio.create_task(upload) for upload in uploads.values()]
        for event in begun.values():
            await event.wait()
        stopping = asyncio.create_task(running.__aexit__(None, None, None))
        while True:
            await asyncio.sleep(0.05)
            try:
                async with httpx.AsyncClient() as late:
                    await late.get(f"{service.url}/healthz")
            except httpx.ConnectError:
                break
        assert not stopping.done()
        go_on.set()
        answers = await asyncio.gather(*sending)
        assert [answer.status_code for answer in answers] == [202, 204]
        await stopping
    assert await admin.fetchval("select count(*) from upload_pipeline.documents where upload_deadline is null") == 2


async def test_a_request_that_does_not_end_in_time_does_not_hold_up_the_stop(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    def app_with_a_stuck_route(*arguments: Any) -> Any:
        app = create_app(*arguments)

        async def stuck() -> None:
            begun.set()
            await asyncio.sleep(3600)

        app.add_api_route("/probe/stuck", stuck)
        return app

    monkeypatch.setattr(server, "create_app", app_with_a_stuck_route)
    async with asyncio.timeout(30), httpx.AsyncClient() as client:
        async with running_service(
            settings_of(database, tmp_path, api_shutdown_grace=1.0), database.worker_url
        ) as service:
            asking = asyncio.create_task(client.get(f"{service.url}/probe/stuck"))
            await begun.wait()
        with pytest.raises(httpx.HTTPError):
            (await asking).raise_for_status()


def test_the_secrets_of_the_settings_are_not_shown(database: Database, tmp_path: Path) -> None:
    from upload_pipeline.cli.shown_settings import effective_settings

    shown = str(effective_settings(settings_of(database, tmp_path)))
    assert SECRET not in shown
    assert os.fspath(tmp_path) in shown
