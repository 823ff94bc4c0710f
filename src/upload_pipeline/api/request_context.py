"""What every request has, whatever becomes of it: a correlation id, a log line, security headers, no leaked faults.

Pure ASGI, so that bodies stream through and a client that leaves is noticed.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import structlog
from fastapi import Depends, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from upload_pipeline.api.error_bodies import error_response, fault_response
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.logs import log_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from upload_pipeline.api.metrics import ServiceMetrics

log = structlog.get_logger(__name__)

CORRELATION_HEADER = "X-Correlation-ID"
_CORRELATION_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,200}")

PROBE_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked by machines, by address and often: any Host is served, and no log line is written of a success."""

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-site",
}
_JSON_POLICY = "default-src 'none'; frame-ancestors 'none'"
_PAGES = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc"})


async def _correlation_id(request: Request) -> str:
    correlation_id: str = request.state.correlation_id
    return correlation_id


CorrelationId = Annotated[str, Depends(_correlation_id)]
"""A route's parameter of this type is the request's correlation id; give it to everything that follows from it."""


class RequestContext:
    """Names the request, binds the name to all log lines, adds headers to the answer and writes one line about it.

    A caller's own `X-Correlation-ID` is kept where it has 1 to 200 of letters, digits and `._:/+=@-`.
    """

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(CORRELATION_HEADER, "")
        correlation_id = given if _CORRELATION_ID.fullmatch(given) else str(uuid4())
        scope.setdefault("state", {})["correlation_id"] = correlation_id
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[CORRELATION_HEADER] = correlation_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"] not in _PAGES:
                    headers.setdefault("Content-Security-Policy", _JSON_POLICY)
                if not scope["path"].startswith("/docs"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        fields = {"correlation_id": correlation_id}
        before = log_fields.set(fields)
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            log_fields.set(fields)
            seconds = time.perf_counter() - started
            content_type = Headers(scope=scope).get("content-type", "")
            self._metrics.observe_request(scope["method"], route_of(scope), status, seconds, content_type)
            if scope["path"] not in PROBE_PATHS or status >= 400:
                principal = scope["state"].get("principal")
                log.info(
                    "request",
                    correlation_id=correlation_id,
                    method=scope["method"],
                    route=route_of(scope),
                    status=status or None,
                    milliseconds=round(seconds * 1000, 1),
                    user_id=None if principal is None else principal.user_id,
                    principal=None if principal is None else principal.kind,
                )
            log_fields.reset(before)


class TrustedHosts:
    """Answers 400 to a request for a host that is none of ours, so that no page can lend us its name."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._any = "*" in hosts
        self._names = frozenset(host.lower() for host in hosts)
        self._suffixes = tuple(host[1:].lower() for host in hosts if host.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or self._any or scope["path"] in PROBE_PATHS:
            await self._app(scope, receive, send)
            return
        host = _without_port(Headers(scope=scope).get("host", "")).lower()
        if host in self._names or host.endswith(self._suffixes):
            await self._app(scope, receive, send)
            return
        error = PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            "This service does not answer to that Host. Its operator names its hosts in "
            "UPLOAD_PIPELINE_API_TRUSTED_HOSTS.",
        )
        await error_response(error, scope["state"]["correlation_id"])(scope, receive, send)


class Faults:
    """Turns what nobody expected into a 500 that says nothing but its code, and a log line that says everything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            return  # nobody is there to be answered, and it is no fault
        except Exception as error:
            log.exception("request_failed", route=route_of(scope))
            if begun:
                raise  # the server closes the connection, so that a half answer is not taken for a whole one
            await fault_response(error, scope["state"]["correlation_id"])(scope, receive, send)


def route_of(scope: Scope) -> str:
    """The template of the path that serves a request, as `/api/v2/jobs/{job_id}`; `unmatched` where none does."""
    route = scope.get("route")
    return getattr(route, "path", None) or "unmatched"


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
