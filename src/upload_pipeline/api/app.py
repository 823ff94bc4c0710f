"""The FastAPI application put together: routers, errors, what every request has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import upload_pipeline
from upload_pipeline.api import (
    batches,
    document_bytes,
    documents,
    history,
    job_events,
    jobs,
    photo_bytes,
    photo_detections,
    photos,
    policies,
    policy_graph,
    search,
    service_routes,
    sessions,
    upload_bytes,
    uploads,
    webhooks,
)
from upload_pipeline.api.body_limit import MAX_JSON_BYTES, BodyLimit
from upload_pipeline.api.error_bodies import install_error_handlers
from upload_pipeline.api.limits import within_limits
from upload_pipeline.api.metrics import ServiceMetrics
from upload_pipeline.api.openapi import install_openapi
from upload_pipeline.api.request_context import CORRELATION_HEADER, Faults, RequestContext, TrustedHosts
from upload_pipeline.api.session_cookies import SessionCookies
from upload_pipeline.api.unread_bodies import UnreadBodies

if TYPE_CHECKING:
    from fastapi import APIRouter

    from upload_pipeline.api.resources import Resources
    from upload_pipeline.settings import Settings

ROUTERS: tuple[APIRouter, ...] = (
    documents.router,
    jobs.router,
    job_events.router,
    search.router,
    policies.router,
    policy_graph.router,
    history.router,
    sessions.router,
    uploads.router,
    batches.router,
    photos.router,
)
"""The routers whose every route has a caller (`CurrentPrincipal`); they are counted by `within_limits`."""

OPEN_ROUTERS: tuple[APIRouter, ...] = (
    document_bytes.router,
    upload_bytes.router,
    photo_bytes.router,
    webhooks.router,
    photo_detections.router,
    service_routes.router,
)
"""The routers that nobody signs in for: probes, URLs that carry their own permission, and messages that are signed."""

_EXPOSED_HEADERS = (
    CORRELATION_HEADER,
    "Content-Disposition",
    "ETag",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
)


def create_app(settings: Settings, resources: Resources) -> FastAPI:
    """The application; it neither opens nor closes the resources.

    Args:
        settings: of this process.
        resources: open for as long as the application serves.
    """
    metrics = ServiceMetrics()
    metrics.show_resources(resources)
    app = FastAPI(
        title="Upload pipeline",
        summary="Files go in; searchable, per-user text comes out; nothing gets lost on the way.",
        version=upload_pipeline.__version__,
        # A client made from the OpenAPI document calls its functions by these.
        generate_unique_id_function=lambda route: route.name,
        # A path with a slash too many is no path of ours. A redirect would name the scheme that this process is called
        # by, and so have clients behind a proxy repeat their credentials without TLS.
        redirect_slashes=False,
        middleware=[
            Middleware(UnreadBodies),
            Middleware(RequestContext, metrics=metrics),
            Middleware(SessionCookies),
            Middleware(TrustedHosts, hosts=(*settings.api_trusted_hosts, settings.api_host)),
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                # with cookies only for pages that are named
                allow_credentials=settings.sessions_enabled and "*" not in settings.cors_origins,
                allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
                allow_headers=[
                    "Authorization",
                    "Content-Type",
                    "X-API-Key",
                    CORRELATION_HEADER,
                    "Last-Event-ID",
                    "If-None-Match",
                ],
                expose_headers=_EXPOSED_HEADERS,
                max_age=600,
            ),
            Middleware(Faults),
            Middleware(BodyLimit, max_bytes=MAX_JSON_BYTES, seconds=settings.api_body_timeout),
        ],
    )
    app.state.resources = resources
    app.state.metrics = metrics
    app.state.ready_looks = service_routes.ReadyLooks(resources)
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(within_limits)])
    for router in OPEN_ROUTERS:
        app.include_router(router)
    install_openapi(app)
    return app
