"""The application in the test's own event loop, and requests to it as one user or another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
import jwt
from fastapi import APIRouter, Depends, FastAPI, Query
from issuer import ISSUER, SECRET, USER, claims
from postgres_servers import Database

from upload_pipeline.api.app import create_app
from upload_pipeline.api.limits import within_limits
from upload_pipeline.api.principals import CurrentPrincipal, require_role
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import Resources, open_resources
from upload_pipeline.settings import Settings, load_settings

_router = APIRouter()


@_router.get("/probe/me")
async def me(principal: CurrentPrincipal, correlation_id: CorrelationId) -> dict[str, Any]:
    """Who is calling."""
    return {
        "user_id": principal.user_id,
        "roles": sorted(principal.roles),
        "kind": principal.kind,
        "correlation_id": correlation_id,
    }


@_router.get("/probe/admin")
async def admin_only(principal: CurrentPrincipal) -> str:
    """For administrators."""
    require_role(principal, "ADMIN", "FP_MANAGER")
    return "welcome"


@_router.get("/probe/number/{number}")
async def number(number: int, size: Annotated[int, Query(ge=1, le=5)] = 1) -> int:
    """Takes numbers."""
    return number * size


@dataclass(frozen=True, slots=True)
class Api:
    """The application with some routes of the tests' own below `/probe`."""

    app: FastAPI
    client: httpx.AsyncClient
    resources: Resources
    settings: Settings
    database: Database

    async def get(self, path: str, user: UUID = USER, **headers: str) -> httpx.Response:
        """Asks as a user."""
        return await self.client.get(path, headers={"Authorization": f"Bearer {token(user)}", **headers})


def token(user: UUID = USER, **changes: Any) -> str:
    """A token of a user that the application accepts."""
    return jwt.encode(claims(sub=str(user), **changes), SECRET, algorithm="HS256")


@asynccontextmanager
async def open_api(database: Database, home: Path, **given: Any) -> AsyncIterator[Api]:
    """The application with these settings."""
    limits = {name: 100_000 for name in Settings.model_fields if name.startswith("limit_")}
    settings = load_settings(
        **(
            {
                "home": home,
                "database_url": database.worker_url,
                "jwt_issuer": ISSUER,
                "jwt_secret": SECRET,
                "pool_size": 8,
            }
            | limits
            | given
        )
    )
    async with open_resources(settings, database.worker_url) as resources:
        app = create_app(settings, resources)
        app.include_router(_router, dependencies=[Depends(within_limits)])
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield Api(app, client, resources, settings, database)
