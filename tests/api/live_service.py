"""The service on a socket, in the test's own event loop, and clients that speak to it as its users."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import jwt
import uvicorn

from upload_pipeline.api.app import create_app
from upload_pipeline.api.resources import Resources, open_resources
from upload_pipeline.settings import Settings, load_settings

SECRET = "a secret of these tests, which is long enough for HS256"
ISSUER = "https://issuer.test/auth/v1"


@dataclass
class LiveService:
    """A running service.

    Attributes:
        url: where it is reached.
    """

    url: str
    settings: Settings
    resources: Resources
    _clients: list[httpx.AsyncClient] = field(default_factory=list)

    def client(self, user: UUID | None = None, **headers: str) -> httpx.AsyncClient:
        """A client that calls as a user, or as nobody; closed with the service."""
        if user is not None:
            headers["Authorization"] = f"Bearer {token(user)}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        opened = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, limits=limits)
        self._clients.append(opened)
        return opened

    async def close(self) -> None:
        for opened in self._clients:
            await opened.aclose()


def token(user: UUID, *, secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """A user's token; `claims` replace those of a good one, None leaves one out."""
    now = int(time.time())
    good = {"sub": str(user), "aud": "authenticated", "iss": ISSUER, "role": "authenticated"}
    whole = {**good, "iat": now, "exp": now + 600, **claims}
    return jwt.encode({name: value for name, value in whole.items() if value is not None}, secret, algorithm=algorithm)


def service_settings(database_url: str, home: Path, **overrides: Any) -> Settings:
    """Settings of a service for tests: the limits are out of the way, looks are quick."""
    chosen: dict[str, Any] = {
        "home": home,
        "database_url": database_url,
        "jwt_secret": SECRET,
        "jwt_issuer": ISSUER,
        "sse_interval": 0.03,
        "limit_requests_per_hour": 1_000_000,
        "limit_status_reads_per_minute": 1_000_000,
        "limit_uploads_per_day": 1_000_000,
        "limit_uploads_per_minute": 1_000_000,
        **overrides,
    }
    return load_settings(**chosen)


@asynccontextmanager
async def running_service(
    settings: Settings, change: Callable[[Resources], Resources] = lambda resources: resources
) -> AsyncIterator[LiveService]:
    """The service for as long as the context is open; `change` lets a test put something in the way of a part."""
    async with open_resources(settings, settings.database_url.get_secret_value()) as opened:
        resources = change(opened)
        app = create_app(settings, resources)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", access_log=False)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            if serving.done():
                serving.result()
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        service = LiveService(f"http://127.0.0.1:{port}", settings, resources)
        try:
            yield service
        finally:
            resources.job_feed.close()
            await service.close()
            server.should_exit = True
            await serving


@dataclass(frozen=True)
class Frame:
    """One event of a stream, or (all None) a comment."""

    event: str | None
    id: int | None
    data: Any


async def frames(response: httpx.Response) -> AsyncIterator[Frame]:
    """The events of a `text/event-stream` response as they arrive."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
            continue
        event_id = int(fields["id"]) if "id" in fields else None
        yield Frame(fields.get("event"), event_id, json.loads(fields["data"]) if "data" in fields else None)
        fields = {}


async def follow(client: httpx.AsyncClient, job: UUID, after: int | None = None) -> Sequence[Frame]:
    """A job's stream until it ends, without comments."""
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})
    async with client.stream("GET", f"/api/v2/jobs/{job}/events", headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        return [frame async for frame in frames(response) if frame.data is not None]


def new_user() -> UUID:
    """A user that nobody has heard of."""
    return uuid4()
