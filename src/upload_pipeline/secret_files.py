"""Secrets that a home makes for itself: once, and readable by its owner alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from upload_pipeline.errors import ErrorCode, PipelineError

SECRET_BYTES = 48


def own_secret(home: Path, name: str) -> bytes:
    """A secret of a home; made where there is none. Processes that make it at once get the same one.

    Args:
        home: where all local state lives; made where it is missing.
        name: of the file in it.

    Raises:
        PipelineError: `SETTING_INVALID` where others can read the file, it is too short or cannot be made.
    """
    path = home / name
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


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Written beside and linked, so that nobody ever reads a part of it, and the first of several makers wins.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES).encode())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()


def _unusable(path: Path, reason: str) -> PipelineError:
    return PipelineError(ErrorCode.SETTING_INVALID, f"The secret {path} cannot be used: {reason}.")
