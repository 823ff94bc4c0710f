"""Tokens for trying things out beside the embedded database, without any service that signs users in.

The secret is made once, for one home, and readable by its owner alone. It signs nothing but tokens of an issuer of its
own, which no service with `JWT_ISSUER` set accepts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jwt

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from upload_pipeline.settings import Settings

DEVELOPMENT_ISSUER = "upload-pipeline-development"
SECRET_FILE = "development-secret"  # noqa: S105 - the name of a file
SECRET_BYTES = 48


def development_secret(home: Path) -> bytes:
    """The secret of a home; made where there is none. Processes that make it at once get the same one.

    Raises:
        PipelineError: `SETTING_INVALID` where others can read the file, it is too short or cannot be made.
    """
    path = home / SECRET_FILE
    try:
        if not path.exists():
            _make(path)
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read().strip()
    except OSError as error:
        raise _unusable(path, str(error.strerror or error)) from error
    if mode & 0o077:
        raise _unusable(path, f"others may open it (mode {mode:o}), so it is no secret. Remove it: a new one is made")
    if len(secret) < SECRET_BYTES:
        raise _unusable(path, "it is too short. Remove it: a new one is made")
    return secret


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


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Written beside and linked, so that nobody ever reads a part of it, and the first of several makers wins.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{SECRET_FILE}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES).encode())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()


def _unusable(path: Path, reason: str) -> PipelineError:
    return PipelineError(ErrorCode.SETTING_INVALID, f"The secret for development, {path}, cannot be used: {reason}.")
