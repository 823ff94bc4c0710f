"""LlamaParse's messages about its jobs: whether one is signed with our secret, and which job it speaks of.

What a message says is taken for a hint to look at that job, never for the state of it: messages come late, twice and in
any order. They are JSON, or, in the older of two formats, a JSON string that holds JSON.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

SIGNATURE_HEADER = "LC-Signature"

MAX_BYTES = 64 * 1024
"""Largest message that is read: they name a job and hold nothing of the document."""

_UNDER_WAY = frozenset({"parse.pending", "parse.running"})
# The official client has no type for a message: each name that guides or neighbouring services use.
_ID_NAMES = ("job_id", "jobId", "id")
_TYPE_NAMES = ("event_type", "eventType", "type", "event")


def is_signed(raw: bytes, signature: str, secret: str) -> bool:
    """Whether a message carries the HMAC-SHA256 of its very bytes, as `sha256=<hex>`; compared in constant time."""
    expected = "sha256=" + hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected.encode(), signature.strip().encode())


def ended_parse(raw: bytes) -> str | None:
    """The job that a message says has ended, or may have; None where it says another thing, or nothing readable."""
    try:
        message: Any = json.loads(raw)
        if isinstance(message, str):
            message = json.loads(message)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or _first(message, _TYPE_NAMES) in _UNDER_WAY:
        return None
    data = message.get("data")
    return (_first(data, _ID_NAMES) if isinstance(data, dict) else None) or _first(message, _ID_NAMES)


def _first(values: dict[str, Any], names: tuple[str, ...]) -> str | None:
    # printable: a NUL or half a surrogate pair is in no name, and no database takes them
    found = (value for name in names if isinstance(value := values.get(name), str) and value and value.isprintable())
    return next(found, None)
