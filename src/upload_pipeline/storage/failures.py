"""What went wrong in a store, said in the words of the closed list of error codes."""

from __future__ import annotations

import errno

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import ENV_PREFIX
from upload_pipeline.storage.refusals import Refusal

STORAGE_SETTING = f"{ENV_PREFIX}STORAGE_URL"
"""The setting that a storage error sends its reader to."""

STORE_FAILURES: tuple[type[Exception], ...] = (OSError, BaseError)
"""What local files and obstore raise; `TimeoutError` is an `OSError`."""

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def missing(key: str) -> PipelineError:
    """The error of an object that is not there."""
    return PipelineError(
        ErrorCode.OBJECT_MISSING,
        f"The object {key} is not in the store. It was deleted, its days in the bucket were over "
        f"({ENV_PREFIX}STORAGE_RAW_DAYS), or {STORAGE_SETTING} names another store than before; upload the file again "
        "or point the setting back.",
        {"key": key},
    )


def too_large(limit: int, key: str) -> PipelineError:
    """The error of bytes that exceed `limit`."""
    return PipelineError(
        ErrorCode.FILE_TOO_LARGE,
        f"The file is larger than the limit of {limit} bytes. Send a smaller file, or raise "
        f"{ENV_PREFIX}MAX_FILE_BYTES where that is the limit.",
        {"max_bytes": limit, "key": key},
    )


def denied(action: str, reason: str, key: str = "") -> PipelineError:
    """The error of a store that does not let us."""
    return PipelineError(
        ErrorCode.STORAGE_DENIED,
        f"The store refused to {action}: {reason}. Give this process read and write permission on the place "
        f"that {STORAGE_SETTING} names.",
        {"key": key} if key else {},
    )


def unavailable(action: str, reason: str, remedy: str, key: str = "") -> PipelineError:
    """The error of a store that cannot at the moment."""
    return PipelineError(
        ErrorCode.STORAGE_UNAVAILABLE,
        f"The store could not {action}: {reason}. {remedy}",
        {"key": key} if key else {},
    )


def no_room(action: str, reason: str, place: str, key: str = "") -> PipelineError:
    """The error of a disk that is full, or too full for what is to come.

    Args:
        action: what was tried, to complete "no room to ...".
        reason: how it is known.
        place: where space is to be made.
        key: the object concerned, if one is.
    """
    return PipelineError(
        ErrorCode.INSUFFICIENT_STORAGE,
        f"There is no room to {action}: {reason}. Free space {place}, then try again; nothing of this was kept.",
        {"key": key} if key else {},
    )


def stalled(action: str, seconds: float, key: str = "") -> PipelineError:
    """The error of a store that made no progress within its bound."""
    return unavailable(
        action,
        f"nothing moved for {seconds:g} s",
        f"Check that the place that {STORAGE_SETTING} names answers, then try again.",
        key,
    )


def translate(error: Exception, action: str, key: str = "", refusal: Refusal | None = None) -> PipelineError:
    """Names a failure of a store.

    Args:
        error: one of `STORE_FAILURES`, or an error that has its name already, which comes back as it is.
        action: what was tried, to complete "could not ...".
        key: the object concerned, if one is.
        refusal: what the store knows of it, if anything.
    """
    if isinstance(error, PipelineError):
        return error
    if refusal is not None:
        code = ErrorCode.STORAGE_DENIED if refusal.denied else ErrorCode.STORAGE_UNAVAILABLE
        message = f"The store did not {action}: {refusal.reason}. {refusal.remedy}"
        return PipelineError(code, message, {"key": key} if key else {})
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return denied(action, _first_line(error), key)
    if isinstance(error, OSError):
        if error.errno in _DENIED:
            return denied(action, error.strerror or _first_line(error), key)
        if error.errno in _FULL:
            return no_room(action, "the disk or quota is full", f"where {STORAGE_SETTING} points", key)
        reason = error.strerror or _first_line(error)
        remedy = f"Check the place that {STORAGE_SETTING} names (does it exist, is it mounted), then try again."
    else:
        reason = _first_line(error)
        remedy = f"Check that the server of {STORAGE_SETTING} can be reached and is well, then try again."
    return unavailable(action, reason, remedy, key)


def _first_line(error: Exception) -> str:
    # obstore appends a dump of the source error, which may quote request headers.
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
