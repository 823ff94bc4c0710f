"""Who is calling: found by a token, an API key or a browser's session, in this order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from upload_pipeline.api.api_keys import find_user
from upload_pipeline.api.resources import AppResources
from upload_pipeline.api.same_site import require_same_site
from upload_pipeline.api.session_cookies import COOKIE, find_or_open_session
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.logs import log_fields
from upload_pipeline.storage.keys import uploader_of


@dataclass(frozen=True, slots=True)
class Principal:
    """A known caller.

    Attributes:
        user_id: whose rows it may see.
        roles: of the application, as `ADMIN`; never the database's.
        kind: how it was found.
        expires_at: seconds since 1970 after which its credentials are good no more; None where they stay good.
        token: that it came with, where another service would know it, too.
    """

    user_id: UUID
    roles: frozenset[str]
    kind: Literal["jwt", "api_key", "session"]
    expires_at: float | None = None
    token: str | None = field(default=None, repr=False)

    def token_for(self, raw_key: str) -> str | None:
        """Its token, to ask the object store for a URL; None where there is none, or the key is not in its folder.

        A document of a session that has become a user's stays in the session's, where a store's policies hide it.
        """
        return self.token if uploader_of(raw_key) == self.user_id else None


_bearer = HTTPBearer(auto_error=False, bearerFormat="JWT", description="A user's access token.")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="A key of `upload-pipeline keys create`.")
_cookie = APIKeyCookie(name=COOKIE, auto_error=False, description="A browser's anonymous session.")


async def _current_principal(
    request: Request,
    resources: AppResources,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    api_key: Annotated[str | None, Security(_api_key)],
    cookie: Annotated[str | None, Security(_cookie)],
) -> Principal:
    # The first credentials that are there decide: a bad token beside a good key is no mistake to overlook.
    if bearer is not None:
        known = await resources.tokens.verify(bearer.credentials)
        # Those for development are known to nobody else.
        token = None if resources.settings.development_tokens else bearer.credentials
        principal = Principal(known.user_id, known.roles, "jwt", known.expires_at, token)
    elif api_key is not None:
        found = await find_user(resources.db, api_key)
        if found is None:
            raise PipelineError(
                ErrorCode.UNAUTHENTICATED,
                "The API key is not accepted: it is unknown, revoked or has expired. Ask the operator for a new one.",
            )
        principal = Principal(found.user_id, found.roles, "api_key", found.expires_at)
    else:
        session = await find_or_open_session(request, resources, cookie)
        if session is None:
            raise PipelineError(
                ErrorCode.UNAUTHENTICATED,
                "Credentials are needed: `Authorization: Bearer <token>` or `X-API-Key: <key>`. A browser gets a "
                "session at `POST /api/ingestion/session`.",
            )
        require_same_site(request, resources.settings)
        principal = Principal(session.user_id, frozenset(), "session", session.expires_at.timestamp())
    request.state.principal = principal
    log_fields.set({**log_fields.get(), "user_id": principal.user_id})
    return principal


CurrentPrincipal = Annotated[Principal, Depends(_current_principal)]
"""A route's parameter of this type is the caller; without good credentials the answer is 401."""


def require_role(principal: Principal, *roles: str) -> None:
    """Lets a caller pass who has one of the application roles.

    Raises:
        PipelineError: `FORBIDDEN`, naming the roles.
    """
    if principal.roles.isdisjoint(roles):
        raise PipelineError(
            ErrorCode.FORBIDDEN, f"This needs one of the roles {', '.join(roles)}.", {"roles": list(roles)}
        )
