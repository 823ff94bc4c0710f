from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest
from attacks import ATTACKS
from fastapi.routing import APIRoute
from in_process import Api, open_api, token
from issuer import ISSUER, SECRET, USER, jwks_server
from postgres_servers import Database

from upload_pipeline.api.api_keys import NewKey, make_key
from upload_pipeline.api.app import ROUTERS
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.database import api_keys
from upload_pipeline.database.as_user import as_user
from upload_pipeline.errors import PipelineError


@pytest.fixture
def worker_sync(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.worker_url, autocommit=True) as connection:
        yield connection


def stored(connection: psycopg.Connection[Any], user: UUID = USER, **given: Any) -> tuple[NewKey, UUID]:
    made = make_key()
    key_id = api_keys.create_api_key(
        connection,
        **(
            {"prefix": made.prefix, "key_sha256": made.key_sha256, "user_id": user, "name": "test", "roles": ["ADMIN"]}
            | {"expires_at": None}
            | given
        ),
    )
    return made, key_id


async def test_a_token_and_a_key_tell_the_same_user(api: Api, worker_sync: psycopg.Connection[Any]) -> None:
    made, _ = stored(worker_sync)
    by_token = (await api.get("/probe/me")).json()
    by_key = (await api.client.get("/probe/me", headers={"X-API-Key": made.key})).json()
    assert (by_token["user_id"], by_token["roles"], by_token["kind"]) == (str(USER), ["ADMIN"], "jwt")
    assert (by_key["user_id"], by_key["roles"], by_key["kind"]) == (str(USER), ["ADMIN"], "api_key")


async def test_nobody_passes_any_route_with_credentials_that_are_none(database: Database, tmp_path: Path) -> None:
    routes = [(method, path) for path, methods in user_routes() for method in methods]
    assert len(routes) >= 5
    async with (
        jwks_server() as published,
        open_api(database, tmp_path, jwt_secret="", jwt_jwks_url=published.url) as api,
    ):
        attacks: dict[str, dict[str, str]] = {name: bearer(make()) for name, make in ATTACKS.items()}
        attacks |= {
            "nothing": {},
            "basic": {"Authorization": "Basic YWRtaW46YWRtaW4="},
            "empty bearer": {"Authorization": "Bearer "},
            "unknown key": {"X-API-Key": make_key().key},
            "malformed key": {"X-API-Key": "upk_' or true --"},
            "token as key": {"X-API-Key": token()},
            "session cookie": {"Cookie": f"upload_session={token()}; sb-access-token={token()}"},
        }
        for method, path in routes:
            for name, headers in attacks.items():
                answer = await api.client.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, name, answer.text)
                body = answer.json()["error"]
                assert body["code"] == "UNAUTHENTICATED"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.headers["X-Correlation-ID"] == body["correlation_id"]
        assert published.asked <= 2


def user_routes() -> Iterator[tuple[str, set[str]]]:
    """Every route that somebody has to sign in for, with made-up ids in its path."""
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            path = route.path
            for name in route.param_convertors:
                path = path.replace("{" + name + "}", str(uuid4()))
            yield path, route.methods or set()


def bearer(credentials: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credentials}"}


async def test_every_user_route_asks_for_a_principal() -> None:
    assert CurrentPrincipal
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            names = {dependency.call.__name__ for dependency in route.dependant.dependencies if dependency.call}
            assert "_current_principal" in names, route.path


async def test_bad_credentials_are_not_made_good_by_others_beside_them(
    api: Api, worker_sync: psycopg.Connection[Any]
) -> None:
    made, _ = stored(worker_sync)
    answer = await api.client.get("/probe/me", headers={"X-API-Key": made.key, **bearer("bad")})
    assert answer.status_code == 401


async def test_roles_open_what_they_open_and_nothing_else(api: Api) -> None:
    for metadata, status in (({"roles": ["ADMIN"]}, 200), ({"roles": ["FP_MANAGER"]}, 200), ({"roles": []}, 403)):
        answer = await api.client.get("/probe/admin", headers=bearer(token(app_metadata=metadata)))
        assert answer.status_code == status
    by_himself = token(app_metadata={}, user_metadata={"roles": ["ADMIN"]}, role="authenticated")
    answer = await api.client.get("/probe/admin", headers=bearer(by_himself))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FORBIDDEN")


async def test_a_key_ends_when_it_is_revoked_or_expires(api: Api, worker_sync: psycopg.Connection[Any]) -> None:
    async def status(key: str) -> int:
        return (await api.client.get("/probe/me", headers={"X-API-Key": key})).status_code

    made, key_id = stored(worker_sync)
    assert await status(made.key) == 200
    assert api_keys.revoke_api_key(worker_sync, key_id)
    assert await status(made.key) == 401
    assert not api_keys.revoke_api_key(worker_sync, key_id)
    with pytest.raises(PipelineError, match="keys list"):
        api_keys.revoke_api_key(worker_sync, uuid4())
    soon, _ = stored(worker_sync, expires_at=datetime.now(UTC) + timedelta(hours=1))
    past, _ = stored(worker_sync, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert (await status(soon.key), await status(past.key)) == (200, 401)


async def test_the_public_part_of_a_key_is_not_the_key(api: Api, worker_sync: psycopg.Connection[Any]) -> None:
    made, _ = stored(worker_sync)
    last = "A" if made.key[-1] != "A" else "B"
    for key in (made.key[:-1] + last, made.key[:-1], made.key + "A", made.prefix, f"upk_{made.prefix}_{'A' * 43}"):
        assert (await api.client.get("/probe/me", headers={"X-API-Key": key})).status_code == 401


async def test_a_key_is_kept_as_a_hash_that_no_role_can_read(
    admin: asyncpg.Connection, worker: asyncpg.Connection, worker_sync: psycopg.Connection[Any]
) -> None:
    made, _ = stored(worker_sync)
    row = await admin.fetchval("select k::text from upload_pipeline.api_keys k")
    assert made.key not in row
    assert made.key.rsplit("_", 1)[1] not in row
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await worker.fetch("select * from upload_pipeline.api_keys")
    listed = api_keys.list_api_keys(worker_sync, user_id=USER, limit=10)
    assert [key.prefix for key in listed] == [made.prefix]
    assert made.key_sha256 not in repr(listed)


async def test_the_last_use_is_kept_to_the_minute(
    api: Api, admin: asyncpg.Connection, worker_sync: psycopg.Connection[Any]
) -> None:
    made, _ = stored(worker_sync)

    async def used() -> tuple[datetime | None, str]:
        return tuple(await admin.fetchrow("select last_used_at, xmin::text from upload_pipeline.api_keys"))

    assert (await used())[0] is None
    answers = await asyncio.gather(*(api.client.get("/probe/me", headers={"X-API-Key": made.key}) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    first = await used()
    assert first[0] is not None
    await api.client.get("/probe/me", headers={"X-API-Key": made.key})
    assert await used() == first
    await admin.execute("update upload_pipeline.api_keys set last_used_at = last_used_at - interval '2 minutes'")
    await api.client.get("/probe/me", headers={"X-API-Key": made.key})
    again = (await used())[0]
    assert again is not None
    assert again >= first[0]


@pytest.mark.parametrize("given", [{"name": ""}, {"name": "x" * 201}, {"user": UUID(int=0)}])
def test_a_key_needs_a_name_and_somebody(worker_sync: psycopg.Connection[Any], given: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match="A key needs"):
        stored(worker_sync, **given)


async def test_a_transaction_as_a_user_ends_with_the_role_and_the_claims(api: Api) -> None:
    who = "select current_user::text, coalesce(auth.uid()::text, '')"
    async with as_user(api.resources.db, USER) as connection:
        assert tuple(await connection.fetchrow(who)) == ("authenticated", str(USER))
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("create temporary table t (i int)")
    for _ in range(api.settings.pool_size):
        assert tuple(await api.resources.db.fetchrow(who)) == ("upload_worker", "")


async def test_secrets_stand_in_no_log_line(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    key = make_key().key
    good = token()
    await api.client.get("/probe/me", headers=bearer(good))
    await api.client.get("/probe/me", headers={"X-API-Key": key})
    await api.client.get("/probe/me", headers=bearer(good[:-4]))
    said = "".join(capsys.readouterr())
    assert "request" in said
    for secret in (key, good, good[:-4], SECRET):
        assert secret not in said
    assert ISSUER not in good
