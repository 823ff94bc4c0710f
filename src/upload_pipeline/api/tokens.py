"""Users' tokens: JWTs that an issuer signs, checked by the one way of signing that is configured.

How a token is checked is never read off the token. An issuer either publishes keys (ES256, RS256) or shares a secret
(HS256); under the first no secret counts, and under the second no public key does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import aiohttp
import jwt
from jwt import PyJWK

from upload_pipeline.api.development_tokens import DEVELOPMENT_ISSUER, development_secret
from upload_pipeline.api.jwks import JwksCache, http_fetch
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import Settings

MAX_TOKEN_CHARS = 16 * 1024
"""Longest token that is looked at; Supabase's have 1 to 2 KB."""

_REQUIRED = ["exp", "aud", "iss", "sub"]
_NO_USERS = frozenset({"anon", "service_role"})

# What PyJWT raises for a bad token, and what its parsing of one lets through (deep nesting, absurd numbers).
_BAD = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)

FindKey = Callable[[str | None], Awaitable[PyJWK | None]]


@dataclass(frozen=True, slots=True)
class KnownUser:
    """Whom credentials name.

    Attributes:
        roles: of the application.
        expires_at: seconds since 1970 after which the credentials are good no more; None where they stay good.
    """

    user_id: UUID
    roles: frozenset[str]
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class TokenVerifier:
    """Tells users by their tokens.

    Attributes:
        find_key: the key for a token's `kid`, with its algorithm; None where there is none.
        issuer: what `iss` must be.
        audience: what `aud` must be, or be among.
        leeway: seconds that clocks may differ by.
    """

    find_key: FindKey = field(repr=False)
    issuer: str
    audience: str
    leeway: float

    async def verify(self, token: str) -> KnownUser:
        """The user and the application roles of a token, and its end.

        Roles are those in `app_metadata.roles`, which only the issuer writes.

        Raises:
            PipelineError: `UNAUTHENTICATED` where the token is not good; `ISSUER_UNAVAILABLE` where that cannot be
                told now.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise _refused("it is too long")
        try:
            kid = jwt.get_unverified_header(token).get("kid")
        except _BAD as error:
            raise _refused("it is no JWT") from error
        key = await self.find_key(kid if isinstance(kid, str) else None)
        if key is None:
            raise _refused("its key is not one of the issuer's")
        try:
            claims = jwt.decode(
                token,
                key=key,
                algorithms=[key.algorithm_name],
                audience=self.audience,
                issuer=self.issuer,
                leeway=self.leeway,
                options={"require": _REQUIRED, "enforce_minimum_key_length": True},
            )
        except jwt.ExpiredSignatureError as error:
            raise _refused("it has expired. Sign in again") from error
        except _BAD as error:
            raise _refused(_REASONS.get(type(error), "its signature or its form is wrong")) from error
        if claims.get("role") in _NO_USERS:
            raise _refused("it is a key of the project and no user's")
        try:
            user_id = UUID(claims["sub"])
        except ValueError as error:
            raise _refused("its `sub` is no UUID") from error
        if not user_id.int:
            raise _refused("its `sub` is nobody")
        return KnownUser(user_id, _roles(claims), float(claims["exp"]))


_REASONS: dict[type[BaseException], str] = {
    jwt.InvalidAudienceError: "its `aud` is not this service's",
    jwt.InvalidIssuerError: "its `iss` is not this service's issuer",
    jwt.MissingRequiredClaimError: "it lacks one of " + ", ".join(_REQUIRED),
    jwt.ImmatureSignatureError: "it is not valid yet",
}


@asynccontextmanager
async def open_token_verifier(settings: Settings) -> AsyncGenerator[TokenVerifier]:
    """The verifier that the settings describe, for as long as it is entered.

    Without any settings about tokens: beside the embedded database the one for development, else one that refuses all.

    Raises:
        PipelineError: `SETTING_INVALID` where the secret for development cannot be used.
    """
    secret = settings.jwt_secret.get_secret_value().encode()
    issuer = settings.jwt_issuer
    if settings.development_tokens:
        secret, issuer = development_secret(settings.home), DEVELOPMENT_ISSUER
    if secret or not issuer:
        yield _verifier(settings, issuer, _shared_secret(secret) if secret else _no_key)
        return
    async with aiohttp.ClientSession() as session:
        url = settings.jwt_jwks_url or f"{issuer.rstrip('/')}/.well-known/jwks.json"
        cache = JwksCache(http_fetch(session, url))
        try:
            yield _verifier(settings, issuer, _published_key(cache))
        finally:
            await cache.close()


def _verifier(settings: Settings, issuer: str, find_key: FindKey) -> TokenVerifier:
    return TokenVerifier(find_key, issuer, settings.jwt_audience, settings.jwt_leeway)


def _published_key(cache: JwksCache) -> FindKey:
    async def find(kid: str | None) -> PyJWK | None:
        return None if kid is None else await cache.find(kid)

    return find


def _shared_secret(secret: bytes) -> FindKey:
    key = PyJWK({"kty": "oct", "k": jwt.utils.base64url_encode(secret).decode()}, "HS256")

    async def find(_kid: str | None) -> PyJWK | None:
        return key

    return find


async def _no_key(_kid: str | None) -> PyJWK | None:
    return None


def _roles(claims: dict[str, Any]) -> frozenset[str]:
    metadata = claims.get("app_metadata")
    roles = metadata.get("roles") if isinstance(metadata, dict) else None
    return frozenset(role for role in roles if isinstance(role, str)) if isinstance(roles, list) else frozenset()


def _refused(reason: str) -> PipelineError:
    return PipelineError(ErrorCode.UNAUTHENTICATED, f"The token is not accepted: {reason}.")
