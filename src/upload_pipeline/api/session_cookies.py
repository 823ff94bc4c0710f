"""The cookie `upload_session`: given to a browser without credentials, kept alive by use, taken away at the end.

256 random bits. What is stored is their SHA-256: nobody finds them by trying, and a slow hash would only slow down
requests. The cookie is for this service alone: no script reads it, and no other site's page sends it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders

from upload_pipeline.api.error_bodies import rate_limited
from upload_pipeline.api.request_context import route_of
from upload_pipeline.api.same_site import cookies_over_tls_only, is_browser_of_ours
from upload_pipeline.database import sessions
from upload_pipeline.database.rate_limits import Bucket, take_tokens

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from upload_pipeline.api.resources import Resources
    from upload_pipeline.database.sessions import Session
    from upload_pipeline.settings import Settings

COOKIE = "upload_session"

OPENING_ROUTES = frozenset(
    {
        ("POST", "/api/ingestion/session"),
        ("GET", "/api/ingestion/history"),
        ("POST", "/api/v2/upload"),
        ("POST", "/api/v1/documents/ingest/batch"),
    }
)
"""Where a browser without credentials gets a session: what it may begin with. All else needs one that is there."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class NewToken:
    """A session's token; the only time that it is whole."""

    token: str
    token_sha256: str


def make_token() -> NewToken:
    """A new token."""
    token = secrets.token_urlsafe(32)
    return NewToken(token, _sha256(token))


def token_sha256(token: str | None) -> str | None:
    """What is stored of a cookie; None for what cannot be one."""
    return _sha256(token) if token is not None and _TOKEN.fullmatch(token) else None


async def find_or_open_session(request: Request, resources: Resources, token: str | None) -> Session | None:
    """The session of a request: the one of its cookie, or else a new one where a browser may get one; None: neither.

    Args:
        request: without other credentials.
        resources: of this process.
        token: the cookie.

    Raises:
        PipelineError: `RATE_LIMITED` where too many sessions are opened.
    """
    settings = resources.settings
    if not settings.sessions_enabled:
        return None
    life = timedelta(seconds=settings.session_seconds)
    known = token_sha256(token)
    if token is not None and known is not None:
        session = await sessions.find_session(resources.db, known, life)
        if session is not None:
            if session.slid:
                give_cookie(request, settings, token)
            return session
    if (request.method, route_of(request.scope)) not in OPENING_ROUTES or not is_browser_of_ours(request, settings):
        return None
    # Of all browsers together: an address is not kept of any, and a browser can be as many as it likes.
    (state,) = await take_tokens(
        resources.db, [Bucket("sessions", settings.limit_sessions_per_minute, timedelta(minutes=1))]
    )
    if not state.allowed:
        raise rate_limited(state)
    made = make_token()
    session = await sessions.open_session(resources.db, made.token_sha256, life)
    give_cookie(request, settings, made.token)
    return session


def give_cookie(request: Request, settings: Settings, token: str) -> None:
    """Has the answer to a request set the cookie, whatever the answer is."""
    _set_cookie(request, settings, token, round(settings.session_seconds))


def drop_cookie(request: Request, settings: Settings) -> None:
    """Has the answer to a request take the cookie away."""
    _set_cookie(request, settings, "", 0)


def _set_cookie(request: Request, settings: Settings, value: str, max_age: int) -> None:
    secure = "; Secure" if cookies_over_tls_only(settings) else ""
    request.scope["state"]["set_cookie"] = (
        f"{COOKIE}={value}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Lax{secure}"
    )


class SessionCookies:
    """Puts the cookie on the answer. Outside of the routes, so that errors carry it as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""

        async def with_cookie(message: Message) -> None:
            cookie = scope.get("state", {}).get("set_cookie")
            if cookie is not None and message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("Set-Cookie", cookie)
            await send(message)

        await self._app(scope, receive, with_cookie)


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
