"""API keys: `upk_<12 hexadecimal digits>_<43 characters>`. The digits find the row, the rest is the secret.

What is stored is the SHA-256 of the whole key. The secret has 256 random bits, so nobody finds it by trying, and a
slow hash would only slow down requests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from upload_pipeline.api.tokens import KnownUser
from upload_pipeline.database import api_keys

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor

_KEY = re.compile(r"upk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_NO_KEY_SHA256 = "0" * 64


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made; the only time that it is whole.

    Attributes:
        prefix: the part that finds it and is no secret.
        key_sha256: what is stored.
    """

    key: str = field(repr=False)
    prefix: str
    key_sha256: str


def make_key() -> NewKey:
    """A new key."""
    prefix = secrets.token_hex(6)
    key = f"upk_{prefix}_{secrets.token_urlsafe(32)}"
    return NewKey(key, prefix, _sha256(key))


async def find_user(db: Executor, key: str) -> KnownUser | None:
    """The user and the roles of a key, and its end; None where it is no key that may be used now.

    Args:
        db: as role `upload_worker`.
        key: as the caller sent it.
    """
    parts = _KEY.fullmatch(key)
    if parts is None:
        return None
    found = await api_keys.find_api_key(db, parts[1])
    # Compared also where there is no row, so that the answer takes as long.
    same = hmac.compare_digest(_sha256(key), _NO_KEY_SHA256 if found is None else found.key_sha256)
    if found is None or not same:
        return None
    if found.stale:
        await api_keys.note_api_key_use(db, found.key_id)
    ends = None if found.expires_at is None else found.expires_at.timestamp()
    return KnownUser(found.user_id, frozenset(found.roles), ends)


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
