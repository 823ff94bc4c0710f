"""Every route with every kind of caller, against a table of the expected answers."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import jwt
import pytest

from tests.api.batch_rows import add_batch
from tests.api.job_rows import add_job, advance, claim
from tests.api.live_service import SECRET, LiveService, new_user, running_service, service_settings, token
from tests.api.photo_rows import add_photo
from upload_pipeline.api.session_cookies import COOKIE, make_token
from upload_pipeline.database import sessions

NOBODIES = ("anonymous", "expired", "wrong audience", "alg none", "algorithm swap", "service token", "anon token")
"""Callers without good credentials: 401 from each route of users."""

STRANGERS = ("other user", "other organisation's user", "other user with roles", "browser with a session")
"""Users who own nothing here."""

EXPECTED: dict[str, tuple[set[int], set[int]]] = {
    # what the owner gets, what strangers get
    "GET /api/v2/jobs": ({200}, {200}),
    "GET /api/v2/jobs/{job_id}": ({200}, {404}),
    "GET /api/v2/jobs/{job_id}/events": ({200}, {404}),
    "POST /api/v2/jobs/{job_id}/retry": ({409}, {404}),
    "POST /api/v2/jobs/{job_id}/cancel": ({409}, {404}),
    "POST /api/v2/search": ({200}, {200}),
    "GET /api/ingestion/history": ({200}, {200}),
    "POST /api/ingestion/session": ({200}, {200}),
    "DELETE /api/ingestion/session": ({204}, {204}),
    # without a cookie there is nothing to claim, and with nothing else nobody who claims
    "POST /api/ingestion/session/claim": ({400}, {400, 401}),
    # a body that is none
    "POST /api/v2/upload": ({400, 415}, {400, 415}),
    # the document came by no upload that waits
    "POST /api/v2/upload/{document_id}/complete": ({200, 202, 409}, {404}),
    "GET /api/v2/documents": ({200}, {200}),
    "GET /api/v2/documents/{document_id}": ({200}, {404}),
    # its text was never written: that is a matter of its state
    "GET /api/v2/documents/{document_id}/markdown": ({409}, {404}),
    "GET /api/v2/documents/{document_id}/chunks": ({200}, {404}),
    "GET /api/v2/documents/{document_id}/download": ({200}, {404}),
    "DELETE /api/v2/documents/{document_id}": ({204}, {404}),
    # without the role, whoever it is; with it, a body that is none
    "POST /api/v1/policies/ingest": ({403}, {403, 415}),
    "GET /api/v1/policies/ingest/status/{job_id}": ({200}, {404}),
    "GET /api/v1/policies/{document_id}/graph": ({200}, {404}),
    # a body that is none
    "POST /api/v1/documents/ingest/batch": ({415}, {415}),
    "GET /api/v1/documents/ingest/batch/{batch_id}/status": ({200}, {404}),
    "POST /api/v1/documents/ingest/batch/{batch_id}/retry": ({200}, {404}),
    "DELETE /api/v1/documents/ingest/batch/{batch_id}": ({200}, {404}),
    # a body that is none
    "POST /api/v1/photos/upload-url": ({400}, {400}),
    "GET /api/v1/photos": ({200}, {200}),
    "GET /api/v1/photos/{photo_id}": ({200}, {404}),
    # its bytes never came
    "PATCH /api/v1/photos/{photo_id}/status": ({409}, {404}),
    "DELETE /api/v1/photos/{photo_id}": ({204}, {404}),
}
"""Routes of users. What is somebody else's is like what is not there."""

OPEN = {"GET /healthz", "GET /readyz", "GET /metrics"}
"""Routes for anybody."""

SIGNED_MESSAGES = {"POST /api/v2/webhooks/llamaparse", "POST /api/v1/photos/{photo_id}/detections"}
"""Routes whose body is signed, by a secret that this service was not given: 404 for everybody."""

SIGNED = re.compile(r"(GET|PUT) /api/(v2/(documents|upload)/\{document_id\}|v1/photos/\{photo_id\})/bytes")
"""Routes whose URL is the permission: who calls makes no difference. Their own tests tell what they refuse."""


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


def credentials(caller: str, owner: UUID) -> dict[str, str]:
    """The headers of a caller."""
    now = int(time.time())
    made = {
        "owner": lambda: token(owner),
        "other user": lambda: token(new_user()),
        "other organisation's user": lambda: token(new_user(), app_metadata={"organisation": str(uuid4())}),
        "other user with roles": lambda: token(
            new_user(), app_metadata={"roles": ["ADMIN", "FP_MANAGER"]}, user_metadata={"sub": str(owner)}
        ),
        "expired": lambda: token(owner, exp=now - 3600),
        "wrong audience": lambda: token(owner, aud="somebody-else"),
        "alg none": lambda: jwt.encode(jwt.decode(token(owner), options={"verify_signature": False}), "", "none"),
        "algorithm swap": lambda: token(owner, secret=SECRET.rjust(64, "x"), algorithm="HS512"),
        "service token": lambda: token(owner, role="service_role"),
        "anon token": lambda: token(owner, role="anon"),
    }
    return {} if caller == "anonymous" else {"Authorization": f"Bearer {made[caller]()}"}


async def test_every_route_answers_every_caller_as_the_table_says(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    owner = new_user()
    job = await add_job(admin, owner)
    await advance(admin, await claim(admin, job), "embedded")
    document = await admin.fetchval("select document_id from upload_pipeline.upload_jobs where job_id = $1", job)
    raw = await admin.fetchval("select raw_key from upload_pipeline.documents where document_id = $1", document)
    await service.resources.store.put_bytes(raw, b"what the owner may fetch")
    await admin.execute(
        "insert into upload_pipeline.policies values ($1, $2, 'insurer', 'product', '2026-01-31')", document, owner
    )
    batch = await add_batch(service.resources.db, owner)
    photo = await add_photo(admin, owner)
    client = service.client()
    made = (await client.get("/openapi.json")).json()
    routes = sorted(f"{method.upper()} {path}" for path, methods in made["paths"].items() for method in methods)

    async def ask(route: str, caller: str, *, real: bool = True) -> httpx.Response:
        method, path = route.split(" ")
        owned = {"job_id": job, "document_id": document, "batch_id": batch, "photo_id": photo}
        named = {name: found if real else uuid4() for name, found in owned.items()}
        body = {"query": "anything"} if path.endswith("/search") else None
        if method == "PATCH":
            body = {"status": "uploaded"}
        if caller == "browser with a session":
            made = make_token()
            await sessions.open_session(service.resources.db, made.token_sha256, timedelta(hours=1))
            headers = {"Cookie": f"{COOKIE}={made.token}", "Origin": service.url}
        else:
            headers = credentials(caller, owner)
        return await client.request(method, path.format(**named), headers=headers, json=body, follow_redirects=False)

    # what changes something comes last, and the owner last of all
    for route in sorted(routes, key=lambda route: (route.startswith("DELETE"), not route.startswith("GET"))):
        if SIGNED.fullmatch(route):
            for caller in (*NOBODIES, *STRANGERS, "owner"):
                answer = await ask(f"{route}?token=eyJtIjoiR0VUIn0.forged", caller)
                assert answer.status_code == 403, (route, caller, answer.status_code, answer.text)
            continue
        if route in SIGNED_MESSAGES:
            for caller in (*NOBODIES, *STRANGERS, "owner"):
                assert (await ask(route, caller)).status_code == 404, (route, caller)
            continue
        if route in OPEN:
            assert (await ask(route, "anonymous")).status_code == 200, route
            continue
        assert route in EXPECTED, f"say in EXPECTED what {route} answers"
        own, foreign = EXPECTED[route]
        for caller in NOBODIES:
            assert (await ask(route, caller)).status_code == 401, (route, caller)
        for caller in STRANGERS:
            answer = await ask(route, caller)
            assert answer.status_code in foreign, (route, caller, answer.status_code, answer.text)
            assert str(owner) not in answer.text
            if "{" in route:
                alike(answer, await ask(route, caller, real=False))
        answer = await ask(route, "owner")
        assert answer.status_code in own, (route, answer.status_code, answer.text)
    assert set(EXPECTED) - set(routes) == set(), "routes that are no more"


def alike(theirs: httpx.Response, missing: httpx.Response) -> None:
    """The answer for what is somebody else's is the one for what is not there, but for ids and times."""
    ids = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
    assert theirs.status_code == missing.status_code
    assert ids.sub("", theirs.text) == ids.sub("", missing.text)
    assert theirs.headers.keys() == missing.headers.keys()
