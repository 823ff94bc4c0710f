from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from fastapi import Request
from in_process import Api, open_api, token
from postgres_servers import Database

from upload_pipeline.errors import HTTP_STATUS, ErrorCode, PipelineError


def test_every_code_has_a_status() -> None:
    assert HTTP_STATUS.keys() == set(ErrorCode)


async def test_a_correlation_id_is_kept_from_the_request_to_the_answer_and_the_body(api: Api) -> None:
    answer = await api.get("/probe/me", **{"X-Correlation-ID": "order-66/part=1"})
    assert answer.headers["X-Correlation-ID"] == answer.json()["correlation_id"] == "order-66/part=1"
    refused = await api.client.get("/nowhere", headers={"X-Correlation-ID": "abc"})
    assert refused.json()["error"]["correlation_id"] == refused.headers["X-Correlation-ID"] == "abc"


@pytest.mark.parametrize("given", ["", "a b", "x" * 201, 'a"b', "a;b", "ä", "<script>", "a\tb"])
async def test_a_correlation_id_that_is_unsafe_is_replaced(api: Api, given: str) -> None:
    answer = await api.client.get("/healthz", headers=[(b"X-Correlation-ID", given.encode("latin-1"))])
    assert len(answer.headers["X-Correlation-ID"]) == 36


async def test_what_does_not_validate_names_its_fields(api: Api) -> None:
    answer = await api.get("/probe/number/one?size=9")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "INVALID_ARGUMENT")
    assert [field["field"] for field in error["details"]["fields"]] == ["number", "size"]


async def test_a_body_that_is_no_json_is_named(api: Api) -> None:
    headers = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}
    answer = await api.client.post("/api/v2/search", headers=headers, content=b'{"query": ')
    assert answer.status_code == 400
    assert [field["field"] for field in answer.json()["error"]["details"]["fields"]] == ["body"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "NOT_FOUND"),
        ("GET", "/api/v2/jobs/", 404, "NOT_FOUND"),
        ("POST", "/api/v2/upload/", 404, "NOT_FOUND"),
        ("DELETE", "/healthz", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/api/v2/jobs", 401, "UNAUTHENTICATED"),
    ],
)
async def test_every_error_has_the_same_form(api: Api, method: str, path: str, status: int, code: str) -> None:
    answer = await api.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"code", "message", "details", "correlation_id"}
    assert answer.json()["error"]["code"] == code


def raising(error: Exception) -> Callable[[], Awaitable[None]]:
    async def route() -> None:
        raise error

    return route


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ValueError("the password is hunter2"), 500, "INTERNAL"),
        (RecursionError("hunter2"), 500, "INTERNAL"),
        (PipelineError(ErrorCode.INTERNAL, "hunter2", {"secret": "hunter2"}), 500, "INTERNAL"),
        (PipelineError(ErrorCode.DATABASE_UNAVAILABLE, "hunter2 at db.internal"), 503, "DATABASE_UNAVAILABLE"),
        (asyncpg.TooManyConnectionsError("hunter2"), 503, "DATABASE_UNAVAILABLE"),
        (asyncpg.UndefinedTableError("hunter2"), 503, "MIGRATIONS_PENDING"),
        (asyncpg.SyntaxOrAccessError("hunter2"), 500, "INTERNAL"),
        (ConnectionRefusedError("hunter2"), 503, "DATABASE_UNAVAILABLE"),
        (TimeoutError(), 503, "DATABASE_UNAVAILABLE"),
        (FileNotFoundError("hunter2"), 500, "INTERNAL"),
        (PipelineError(ErrorCode.INVALID_STATE, "It is done.", {"state": "done"}), 409, "INVALID_STATE"),
    ],
)
async def test_our_own_failures_show_nothing_of_our_insides(api: Api, error: Exception, status: int, code: str) -> None:
    api.app.add_api_route("/probe/raise", raising(error))
    answer = await api.client.get("/probe/raise")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "hunter2" not in answer.text + str(answer.headers)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert answer.json()["error"]["correlation_id"] == answer.headers["X-Correlation-ID"]


async def test_a_message_with_half_a_character_is_answered_all_the_same(api: Api) -> None:
    api.app.add_api_route("/probe/raise", raising(PipelineError(ErrorCode.INVALID_ARGUMENT, "\ud800 is no text")))
    assert (await api.client.get("/probe/raise")).json()["error"]["message"] == "? is no text"


async def test_a_large_body_is_refused_where_it_would_be_held_in_memory(api: Api) -> None:
    async def take(body: dict[str, Any]) -> int:
        return len(body)

    async def stream(request: Request) -> int:
        return sum([len(part) async for part in request.stream()])

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1025):
            yield b"x" * 1024

    api.app.add_api_route("/probe/body", take, methods=["POST"])
    api.app.add_api_route("/probe/stream", stream, methods=["POST"])
    as_json = {"Content-Type": "application/json"}
    for content in (b"x" * (1024 * 1025), parts()):
        answer = await api.client.post("/probe/body", content=content, headers=as_json)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "FILE_TOO_LARGE")
        assert answer.headers["X-Correlation-ID"]
    good = await api.client.post("/probe/body", content=b"{" + b" " * 1024 * 1023 + b"}", headers=as_json)
    assert (good.status_code, good.text) == (200, "0")
    assert (await api.client.post("/probe/stream", content=parts())).json() == 1024 * 1025


async def test_answers_carry_security_headers_and_are_not_kept(api: Api) -> None:
    for path in ("/healthz", "/nowhere", "/openapi.json"):
        headers = (await api.client.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Content-Security-Policy" not in (await api.client.get("/docs")).headers


async def test_only_hosts_of_ours_are_served_but_probes_always(database: Database, tmp_path: Path) -> None:
    async with open_api(database, tmp_path, api_trusted_hosts=("api.example.com", "*.internal")) as api:
        expected = {"api.example.com": 401, "API.example.com:8000": 401, "a.internal": 401, "127.0.0.1:8000": 401}
        expected |= {"evil.com": 400, "api.example.com.evil.com": 400, "internal": 400, "": 400, "[::1]:80": 400}
        for host, status in expected.items():
            answer = await api.client.get("/api/v2/jobs", headers={"Host": host})
            assert answer.status_code == status, host
            assert answer.headers["X-Correlation-ID"]
        assert (await api.client.get("/healthz", headers={"Host": "10.1.2.3:8000"})).status_code == 200


async def test_web_pages_may_call_where_they_are_named(database: Database, tmp_path: Path) -> None:
    async with open_api(database, tmp_path, cors_origins=("https://app.example.com",)) as api:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        good = await api.client.options("/api/v2/jobs", headers={"Origin": "https://app.example.com", **asked})
        bad = await api.client.options("/api/v2/jobs", headers={"Origin": "https://evil.example.com", **asked})
        assert good.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
        assert "Access-Control-Allow-Origin" not in bad.headers
        assert good.headers["X-Correlation-ID"]
        answer = await api.client.get("/api/v2/jobs", headers={"Origin": "https://app.example.com"})
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
        assert "X-Correlation-ID" in answer.headers["Access-Control-Expose-Headers"]
        api.app.add_api_route("/probe/raise", raising(ValueError("x")))
        failed = await api.client.get("/probe/raise", headers={"Origin": "https://app.example.com"})
        assert (failed.status_code, failed.headers["Access-Control-Allow-Origin"]) == (500, "https://app.example.com")


async def test_one_line_is_written_of_each_request(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    await api.get("/probe/number/7", **{"X-Correlation-ID": "abc"})
    await api.client.get("/healthz")
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "request" in line]
    assert len(lines) == 1
    for word in ("abc", "/probe/number/{number}", "200", "GET", "milliseconds", "jwt", "11111111"):
        assert word in lines[0], (word, lines[0])


async def test_the_description_of_the_api_is_valid_json(api: Api) -> None:
    document = json.loads((await api.client.get("/openapi.json")).text)
    assert {"/healthz", "/readyz", "/metrics"} <= document["paths"].keys()
    assert document["components"]["securitySchemes"].keys() == {"HTTPBearer", "APIKeyHeader", "APIKeyCookie"}
