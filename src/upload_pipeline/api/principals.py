"""Who is calling: found by a token or an API key, in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from upload_pipeline.api.resources import AppResources
from upload_pipeline.errors import ErrorCode, PipelineError


@dataclass(frozen=True, slots=True)
class Principal:
    """A known caller.

    Attributes:
        user_id: whose rows it may see.
        roles: of the application, as `ADMIN`; never the database's.
        kind: how it was found.
    """

    user_id: UUID
    roles: frozenset[str]
    kind: Literal["jwt", "api_key"]


_bearer = HTTPBearer(auto_error=False, bearerFormat="JWT", description="A user's access token.")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="A key of `upload-pipeline keys create`.")


async def _current_principal(
    request: Request,
    resources: AppResources,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    api_key: Annotated[str | None, Security(_api_key)],
) -> Principal:
    if bearer is not None:
        user_id, roles = await resources.tokens.verify(bearer.credentials)
        principal = Principal(user_id, roles, "jwt")
        request.state.principal = principal
        return principal
    raise PipelineError(
        ErrorCode.UNAUTHENTICATED,
        "Credentials are needed: `Authorization: Bearer <token>` or `X-API-Key: <key>`.",
    )


CurrentPrincipal = Annotated[Principal, Depends(_current_principal)]
"""A route's parameter of this type is the caller; without good credentials the answer is 401."""
