"""Sessions over HTTP: who gets one, what it may, what keeps other pages out, and how a user takes it over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from tests.api.job_rows import add_job
from tests.api.live_service import LiveService, new_user, running_service, service_settings, token
from upload_pipeline.api.same_site import cookies_over_tls_only
from upload_pipeline.api.session_cookies import COOKIE, OPENING_ROUTES, make_token
from upload_pipeline.settings import load_settings

SESSION = "/api/ingestion/session"
HISTORY = "/api/ingestion/history"
UPLOAD = "/api/v2/upload"
EVIL = "https://evil.example.com"


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(
        database.worker_url,
        tmp_path,
        cors_origins=("https://app.example.com",),
        api_public_url="https://api.example.com",
        session_cookie_secure="never",
    )
    async with running_service(settings) as running:
        yield running


def browser(service: LiveService) -> httpx.AsyncClient:
    """A browser with a page of the service open, and a cookie jar of its own."""
    return service.client(Origin=service.url)


async def opened(service: LiveService) -> httpx.AsyncClient:
    """A browser that has a session."""
    client = browser(service)
    assert (await client.post(SESSION)).status_code == 200
    return client


def given(answer: httpx.Response) -> Any:
    """The session's cookie that an answer sets, with its attributes; None where it sets none."""
    return SimpleCookie("\n".join(answer.headers.get_list("set-cookie"))).get(COOKIE)


async def send(client: httpx.AsyncClient, content: str, filename: str = "note.txt", **headers: str) -> httpx.Response:
    return await client.post(UPLOAD, files={"file": (filename, content.encode(), "text/plain")}, headers=headers)


async def uploaded(client: httpx.AsyncClient, content: str, filename: str = "note.txt") -> UUID:
    answer = await send(client, content, filename)
    assert answer.status_code == 202, answer.text
    return UUID(answer.json()["document_id"])


async def names(client: httpx.AsyncClient, **headers: str) -> list[str]:
    answer = await client.get(HISTORY, headers=headers)
    assert answer.status_code == 200, answer.text
    return sorted(item["filename"] for item in answer.json()["items"])


def bearer(user: UUID) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user)}"}


async def test_a_browser_gets_a_session_and_two_browsers_are_two(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    one, two = browser(service), browser(service)
    answer = await one.post(SESSION)
    cookie = given(answer)
    assert len(cookie.value) == 43
    assert (cookie["httponly"], cookie["samesite"], cookie["path"], cookie["max-age"], cookie["secure"]) == (
        *(True, "Lax", "/", str(30 * 24 * 3600)),
        "",
    )
    assert answer.json()["kind"] == "session"
    again = await one.post(SESSION)
    assert given(again) is None
    assert again.json() == answer.json()
    await two.post(SESSION)
    assert await admin.fetchval("select count(*) from upload_pipeline.sessions") == 2
    await uploaded(one, "mine", "mine.txt")
    assert (await names(one), await names(two)) == (["mine.txt"], [])
    job = (await one.get("/api/v2/jobs")).json()["items"][0]["job_id"]
    assert (await one.get(f"/api/v2/jobs/{job}")).status_code == 200
    assert (await two.get(f"/api/v2/jobs/{job}")).status_code == 404
    rows = await admin.fetch("select to_jsonb(s)::text as row from upload_pipeline.sessions s")
    assert all(cookie.value not in row["row"] for row in rows)


async def test_each_opening_route_opens_one_for_a_browser_and_401_for_a_program(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    served = (await service.client().get("/openapi.json")).json()["paths"]
    for method, path in sorted(OPENING_ROUTES):
        if path not in served:
            continue
        program = await service.client().request(method, path)
        assert (program.status_code, given(program)) == (401, None), path
        client = browser(service)
        # whatever becomes of the request, the session is the browser's
        assert given(await client.request(method, path)) is not None, path
        assert (await client.get("/api/v2/jobs")).status_code == 200
    for path in ("/api/v2/jobs", "/api/v2/documents"):
        answer = await browser(service).get(path)
        assert (answer.status_code, given(answer)) == (401, None), path
    # a read need not name its page, where the browser says that it is one of ours
    for site, status in (("same-origin", 200), ("none", 200), ("cross-site", 401)):
        assert (await service.client().get(HISTORY, headers={"Sec-Fetch-Site": site})).status_code == status
    before = await admin.fetchval("select count(*) from upload_pipeline.sessions")
    for headers in ({"Origin": EVIL}, {"Origin": "null"}, {"Sec-Fetch-Site": "same-origin"}):
        assert (await service.client().post(SESSION, headers=headers)).status_code == 401, headers
    assert (await service.client().get(HISTORY, headers={"Origin": EVIL})).status_code == 401
    assert await admin.fetchval("select count(*) from upload_pipeline.sessions") == before


async def test_a_write_needs_a_page_of_ours_and_a_read_does_not(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    client = await opened(service)
    del client.headers["Origin"]
    job = await add_job(admin, await admin.fetchval("select user_id from upload_pipeline.sessions"))
    host = service.url.removeprefix("http://")
    ours = [service.url, f"HTTPS://{host}", "https://app.example.com", "https://api.example.com"]
    others = [
        *(
            "",
            "null",
            EVIL,
            "http://app.example.com",
            "https://app.example.com.evil.com",
            "https://api.example.com:444",
        ),
        *("http://127.0.0.1", "https://127.0.0.1:443", f"file://{host}", f"http://{host}@evil.com", "http://[", "*"),
        *("http://localhost:" + host.split(":")[1],),
    ]
    cancel, search = f"/api/v2/jobs/{job}/cancel", "/api/v2/search"
    for origin in others:
        for method, path in (("POST", cancel), ("POST", search), ("POST", UPLOAD), ("DELETE", SESSION)):
            answer = await client.request(method, path, headers={"Origin": origin} if origin else {})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FORBIDDEN"), (origin, path)
        assert (await client.get(HISTORY, headers={"Origin": origin} if origin else {})).status_code == 200
    assert await admin.fetchval("select state from upload_pipeline.upload_jobs") == "queued"
    for origin in ours:
        assert (await client.post(cancel, headers={"Origin": origin})).status_code == 200, origin
    # who brings credentials along does not need a page
    user = new_user()
    mine = await add_job(admin, user)
    for origin in ({}, {"Origin": EVIL}):
        answer = await service.client().post(f"/api/v2/jobs/{mine}/cancel", headers={**bearer(user), **origin})
        assert answer.status_code == 200


async def test_other_credentials_come_first_and_a_bad_one_is_not_made_good_by_a_cookie(service: LiveService) -> None:
    client = await opened(service)
    assert (await client.post(SESSION, headers=bearer(new_user()))).json()["kind"] == "jwt"
    assert (await client.get(HISTORY, headers={"Authorization": "Bearer bad"})).status_code == 401
    assert (await client.get(HISTORY, headers={"X-API-Key": "bad"})).status_code == 401
    assert (await client.get(HISTORY)).status_code == 200


async def test_a_cookie_that_is_none_opens_nothing_but_where_a_session_begins(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    client = await opened(service)
    over = client.cookies[COOKIE]
    await admin.execute("update upload_pipeline.sessions set expires_at = now()")
    for value in (over, make_token().token, "short", "x" * 5000, "' or true --", token(new_user())):
        stranger = browser(service)
        headers = {"Cookie": f"{COOKIE}={value}"}
        assert (await stranger.get("/api/v2/documents", headers=headers)).status_code == 401
        answer = await stranger.get(HISTORY, headers=headers)
        assert answer.status_code == 200
        assert given(answer).value not in (over, value)


async def test_use_moves_the_end_of_the_cookie_too_now_and_then(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    client = await opened(service)
    value = client.cookies[COOKIE]
    assert given(await client.get(HISTORY)) is None
    await admin.execute(
        "update upload_pipeline.sessions "
        "set last_seen_at = now() - interval '2 hours', expires_at = now() + interval '1 hour'"
    )
    renewed = given(await client.get(HISTORY))
    assert (renewed.value, renewed["max-age"]) == (value, str(30 * 24 * 3600))
    assert given(await client.get(HISTORY)) is None
    left = await admin.fetchval("select extract(day from expires_at - now()) from upload_pipeline.sessions")
    assert left >= 29


async def test_a_session_that_is_ended_is_over_at_once(service: LiveService, admin: asyncpg.Connection) -> None:
    client = await opened(service)
    value = client.cookies[COOKIE]
    await uploaded(client, "text")
    answer = await client.delete(SESSION)
    assert (answer.status_code, given(answer).value, given(answer)["max-age"]) == (204, "", "0")
    assert COOKIE not in client.cookies
    assert (await client.get("/api/v2/jobs", headers={"Cookie": f"{COOKIE}={value}"})).status_code == 401
    assert (await client.delete(SESSION, headers={"Cookie": f"{COOKIE}={value}"})).status_code == 401
    assert await admin.fetchval("select count(*) from upload_pipeline.documents") == 1
    # a user who signs out of a browser ends what it had before
    client = await opened(service)
    assert (await client.delete(SESSION, headers=bearer(new_user()))).status_code == 204
    assert COOKIE not in client.cookies
    assert await admin.fetchval("select count(*) from upload_pipeline.sessions where ended_at is null") == 0


async def test_a_user_takes_a_session_over_once_and_may_ask_again(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    user = new_user()
    signed_in = service.client(user)
    own = await uploaded(signed_in, "the same", "own.txt")
    client = await opened(service)
    value = client.cookies[COOKIE]
    twin = await uploaded(client, "the same", "twin.txt")
    await uploaded(client, "another", "another.txt")
    keys = {row["raw_key"] for row in await admin.fetch("select raw_key from upload_pipeline.documents")}

    answer = await client.post(f"{SESSION}/claim", headers=bearer(user))
    assert answer.status_code == 200, answer.text
    told = {
        "moved": 1,
        "duplicates": [{"document_id": str(twin), "existing_document_id": str(own)}],
        "remaining": 0,
    }
    assert answer.json() == told
    assert COOKIE not in client.cookies
    assert await names(signed_in) == ["another.txt", "own.txt"]
    # the twin's bytes are gone, the moved one's are where they were
    left = {info.key async for info in service.resources.store.list()}
    gone = keys - left
    assert [key.endswith(str(twin)) for key in gone] == [True]
    for page in (signed_in.get("/api/v2/documents"), signed_in.get("/api/v2/jobs")):
        assert len((await page).json()["items"]) == 2

    cookie = {"Cookie": f"{COOKIE}={value}"}
    assert (await service.client().get(HISTORY, headers=cookie)).status_code == 401
    assert (await signed_in.post(f"{SESSION}/claim", headers=cookie)).json() == told
    other = await service.client(new_user()).post(f"{SESSION}/claim", headers=cookie)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "INVALID_STATE")


async def test_bytes_that_were_announced_by_the_session_still_come_once_it_is_claimed(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    client, user = await opened(service), new_user()
    content = b"# Announced\n\nby nobody, sent by somebody.\n"
    announced = {
        "filename": "late.md",
        "bytes_len": len(content),
        "mime": "text/markdown",
        "sha256": sha256(content).hexdigest(),
    }
    answer = await client.post(UPLOAD, json=announced)
    assert answer.status_code == 202, answer.text
    told = answer.json()
    assert (await client.post(f"{SESSION}/claim", headers=bearer(user))).json()["moved"] == 1
    # the URL names the public address, which a proxy would lead here
    url = told["upload_url"].replace("https://api.example.com", service.url)
    put = await service.client().put(url, content=content, headers=told["upload_headers"])
    assert put.status_code < 300, put.text
    row = await admin.fetchrow("select user_id, upload_deadline, raw_key from upload_pipeline.documents")
    assert (row["user_id"], row["upload_deadline"]) == (user, None)
    assert await service.resources.store.get_bytes(row["raw_key"], 1000) == content
    # and the same bytes again are the same document's, though its id does not follow from this user
    again = await service.client(user).post(UPLOAD, json=announced)
    assert (again.json()["document_id"], again.json()["duplicate"]) == (told["document_id"], True)
    assert (await send(service.client(user), content.decode(), "again.md")).json()["duplicate"]
    assert [info.key async for info in service.resources.store.list()] == [row["raw_key"]]


async def test_what_is_no_claim(service: LiveService) -> None:
    claim = f"{SESSION}/claim"
    client = await opened(service)
    cookie = {"Cookie": f"{COOKIE}={client.cookies[COOKIE]}"}
    assert (await client.post(claim)).status_code == 401
    assert (await client.post(claim, headers={"Authorization": "Bearer bad"})).status_code == 401
    user = service.client(new_user())
    assert (await user.post(claim)).json()["error"]["details"]["fields"][0]["field"] == COOKIE
    assert (await user.post(claim, headers={"Cookie": f"{COOKIE}=x"})).status_code == 400
    assert (await user.post(claim, headers={"Cookie": f"{COOKIE}={make_token().token}"})).status_code == 404
    assert (await user.post(claim, headers={**cookie, "Origin": EVIL})).status_code == 403
    assert (await client.get(HISTORY)).status_code == 200
    await client.delete(SESSION)
    assert (await user.post(claim, headers=cookie)).status_code == 404


async def test_what_a_session_has_used_of_the_day_counts_for_the_user(database: Any, tmp_path: Path) -> None:
    async with running_service(service_settings(database.worker_url, tmp_path, limit_uploads_per_day=4)) as service:
        user = new_user()
        signed_in = service.client(user)
        await uploaded(signed_in, "one")
        client = await opened(service)
        cookie = {"Cookie": f"{COOKIE}={client.cookies[COOKIE]}"}
        for content in ("two", "three"):
            await uploaded(client, content)
        for _ in range(2):
            assert (await signed_in.post(f"{SESSION}/claim", headers=cookie)).status_code == 200
        await uploaded(signed_in, "four")
        assert (await send(signed_in, "five")).status_code == 429


async def test_a_session_has_no_roles(service: LiveService) -> None:
    served = (await service.client().get("/openapi.json")).json()["paths"]
    client = await opened(service)
    if "/api/v1/policies/ingest" in served:
        answer = await client.post("/api/v1/policies/ingest", files={"file": ("a.pdf", b"%PDF-1.7")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FORBIDDEN")


async def test_new_sessions_are_limited_and_may_be_switched_off(database: Any, tmp_path: Path) -> None:
    settings = service_settings(database.worker_url, tmp_path, limit_sessions_per_minute=2)
    async with running_service(settings) as service:
        client = await opened(service)
        await opened(service)
        refused = await browser(service).post(SESSION)
        assert (refused.status_code, given(refused)) == (429, None)
        assert int(refused.headers["Retry-After"]) >= 1
        # those that are there go on
        assert (await client.get(HISTORY)).status_code == 200
    settings = service_settings(database.worker_url, tmp_path, sessions_enabled=False)
    async with running_service(settings) as service:
        cookie = {"Cookie": f"{COOKIE}={client.cookies[COOKIE]}", "Origin": service.url}
        for headers in (cookie, {"Origin": service.url}):
            assert (await service.client().get(HISTORY, headers=headers)).status_code == 401


async def test_cookies_cross_to_pages_that_are_named_and_to_no_others(database: Any, tmp_path: Path) -> None:
    async def allowed(origins: str, page: str) -> str | None:
        settings = service_settings(database.worker_url, tmp_path, cors_origins=(origins,))
        async with running_service(settings) as service:
            answer = await service.client().get(HISTORY, headers={"Origin": page})
            if "access-control-allow-origin" not in answer.headers:
                return None
            return answer.headers.get("access-control-allow-credentials", "without")

    page = "https://app.example.com"
    assert await allowed(page, page) == "true"
    assert await allowed(page, EVIL) is None
    assert await allowed("*", page) == "without"


async def test_nothing_of_the_browser_is_kept_and_the_cookie_stands_in_no_log_line(
    service: LiveService, admin: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    client = await opened(service)
    client.headers["User-Agent"] = "A very particular browser"
    value = client.cookies[COOKIE]
    await uploaded(client, "text")
    await client.get("/api/v2/documents")
    said = "".join(capsys.readouterr())
    assert "principal=session" in said or '"principal": "session"' in said
    assert value not in said
    tables = await admin.fetch(
        "select relname from pg_class where relnamespace = 'upload_pipeline'::regnamespace and relkind = 'r'"
    )
    kept = ""
    for table in tables:
        rows = await admin.fetch(f"select to_jsonb(t)::text as row from upload_pipeline.{table['relname']} t")
        kept += "".join(row["row"] for row in rows)
    assert "note.txt" in kept
    for secret in (value, "particular browser", "127.0.0.1"):
        assert secret not in kept


@pytest.mark.parametrize(
    ("given", "secure"),
    [
        ({}, False),
        ({"api_host": "::1"}, False),
        ({"api_host": "0.0.0.0"}, True),  # noqa: S104 - nothing listens
        ({"api_public_url": "https://api.example.com"}, True),
        ({"api_public_url": "http://localhost:3000"}, False),
        ({"session_cookie_secure": "always"}, True),
        ({"session_cookie_secure": "never", "api_host": "10.0.0.1"}, False),
    ],
)
def test_the_cookie_needs_tls_but_where_there_can_be_none(given: dict[str, Any], secure: bool, tmp_path: Path) -> None:
    assert cookies_over_tls_only(load_settings(home=tmp_path, **given)) is secure


async def test_where_the_cookie_needs_tls_a_page_without_it_is_nobody(database: Any, tmp_path: Path) -> None:
    settings = service_settings(database.worker_url, tmp_path, session_cookie_secure="always")
    async with running_service(settings) as service:
        host = service.url.removeprefix("http://")
        assert (await service.client().post(SESSION, headers={"Origin": service.url})).status_code == 401
        answer = await service.client().post(SESSION, headers={"Origin": f"https://{host}"})
        assert answer.status_code == 200
        assert given(answer)["secure"]
