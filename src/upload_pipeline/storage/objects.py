"""What the store says about objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

OWN_URLS = "clients get URLs of the service"
"""Said of a store that signs none."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it.

    Attributes:
        key: its key.
        size: in bytes.
        modified_at: when its bytes were written, with time zone.
    """

    key: str
    size: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object whose bytes have just passed through this process.

    Attributes:
        key: its key.
        size: in bytes.
        sha256: of its bytes, 64 lower-case hexadecimal digits.
        head: its first bytes, at most as many as were asked for.
    """

    key: str
    size: int
    sha256: str
    head: bytes


@dataclass(frozen=True, slots=True)
class SignedUrl:
    """A URL that lets whoever holds it make one kind of request to the store, for a while.

    Attributes:
        url: where to; a secret, so it belongs in no log.
        headers: what the request must send besides, by lower-case name.
        expires_at: when it ends, with time zone, where that is not what was asked for.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str]
    expires_at: datetime | None = None
