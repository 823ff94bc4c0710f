"""Tokens for trying things out beside the embedded database, without any service that signs users in.

The secret is made once, for one home, and readable by its owner alone. It signs nothing but tokens of an issuer of its
own, which no service with `JWT_ISSUER` set accepts.
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING

import jwt

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.secret_files import own_secret

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from uuid import UUID

    from upload_pipeline.settings import Settings

DEVELOPMENT_ISSUER = "upload-pipeline-development"
SECRET_FILE = "development-secret"  # noqa: S105 - the name of a file


def development_secret(home: Path) -> bytes:
    """The secret of a home; made where there is none.

    Raises:
        PipelineError: `SETTING_INVALID` where it cannot be used; see `own_secret`.
    """
    return own_secret(home, SECRET_FILE)


def development_token(
    settings: Settings, user_id: UUID, *, roles: Sequence[str] = (), lifetime: float = 30 * 86400.0
) -> str:
    """A token that a service of this home accepts.

    Args:
        settings: whose `home` holds the secret.
        user_id: for whom.
        roles: of the application, as `ADMIN`.
        lifetime: seconds.

    Raises:
        PipelineError: `SETTING_INVALID` where this installation takes tokens of somebody else, or the secret cannot be
            used.
    """
    if not settings.development_tokens:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            "Tokens for development are for the embedded database without UPLOAD_PIPELINE_JWT_ISSUER. Sign in at the "
            "issuer of this installation, or make a key by `upload-pipeline keys create`.",
        )
    now = int(time.time())
    claims = {
        "iss": DEVELOPMENT_ISSUER,
        "aud": settings.jwt_audience,
        "sub": str(user_id),
        "role": "authenticated",
        "iat": now,
        "exp": now + int(lifetime),
        "app_metadata": {"roles": list(roles)},
    }
    return jwt.encode(claims, development_secret(settings.home), algorithm="HS256")


def is_exposed(settings: Settings) -> bool:
    """Whether tokens for development are accepted at an address that other machines may reach."""
    return settings.development_tokens and not _is_local(settings.api_host)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
