"""Whether the service is alive and ready, and its metrics. Nobody signs in for these."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from upload_pipeline.api.metrics import ServiceMetrics
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database.migration_state import require_migrations
from upload_pipeline.errors import PipelineError

log = structlog.get_logger(__name__)

router = APIRouter(tags=["service"])

READY_TIMEOUT = 3.0
STORAGE_LOOK_SECONDS = 15.0
"""How long a look at the store counts: it writes an object, and probes come every few seconds from several places."""


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """What of the service works."""

    status: Annotated[Literal["ready", "not ready"], Field(description="`ready` where every check is `ok`.")]
    checks: Annotated[
        dict[str, str],
        Field(
            description="`database`, `migrations`, `storage`: `ok`, or the code of what is wrong; the log says more."
        ),
    ]


class ReadyLooks:
    """The looks that `/readyz` takes; askers that come together share one."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._stored_at = float("-inf")
        self._looking: asyncio.Task[dict[str, str]] | None = None

    async def look(self) -> dict[str, str]:
        """What each check says."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="readiness")
        return await asyncio.shield(self._looking)

    async def _look(self) -> dict[str, str]:
        checks = {"database": "ok", "migrations": "ok", "storage": "ok"}
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                await require_migrations(self._resources.db)
        except PipelineError as error:
            checks["migrations"] = _said("migrations", error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the database does not answer as it should
            checks["database"] = _said("database", error)
            checks["migrations"] = "unknown"
        if time.monotonic() - self._stored_at > STORAGE_LOOK_SECONDS:
            try:
                async with asyncio.timeout(READY_TIMEOUT):
                    await self._resources.store.check_writable()
                self._stored_at = time.monotonic()
            except Exception as error:  # noqa: BLE001 - whatever it is, the store does not answer as it should
                checks["storage"] = _said("storage", error)
        return checks


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """200 while the event loop turns."""
    return Health()


@router.get(
    "/readyz",
    summary="Can the service do its work?",
    responses={503: {"model": Readiness, "description": "Something that the service needs is not there"}},
    response_model=Readiness,
)
async def readyz(request: Request) -> Response:
    """200 where the database answers, its schema is this version's, and the store can be written."""
    looks: ReadyLooks = request.app.state.ready_looks
    checks = await looks.look()
    ready = all(said == "ok" for said in checks.values())
    body = Readiness(status="ready" if ready else "not ready", checks=checks)
    return JSONResponse(body.model_dump(), 200 if ready else 503)


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request, resources: AppResources) -> Response:
    """In Prometheus's text format."""
    measured: ServiceMetrics = request.app.state.metrics
    return Response(await measured.exposition(resources.db), media_type=CONTENT_TYPE_LATEST)


def _said(check: str, error: Exception) -> str:
    log.warning("not_ready", check=check, error=str(error) or type(error).__name__)
    return (
        error.code
        if isinstance(error, PipelineError)
        else "DATABASE_UNAVAILABLE"
        if check == "database"
        else "STORAGE_UNAVAILABLE"
    )
