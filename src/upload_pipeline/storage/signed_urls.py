"""Permissions that travel in a URL: one method, one object, until one moment. For stores that cannot sign themselves.

A token is `<what is granted>.<HMAC-SHA256 over that text>`, both base64url without padding. What is granted can be read
by whoever has the URL, so nothing in it is secret; and nobody can change a byte of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.secret_files import own_secret
from upload_pipeline.storage.keys import validate_key

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

SECRET_FILE = "signing-secret"  # noqa: S105 - the name of a file

MAX_TOKEN_CHARS = 8192
"""A longer one is none of ours; a file name of 255 characters, escaped, is the longest part of one."""

# What is signed begins with this, so that no other use of the same secret ever makes one of these signatures.
_PURPOSE = b"upload-pipeline object URL 1\0"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a URL allows.

    Attributes:
        method: the one HTTP method.
        document_id: of the document, or the photo, that the object belongs to.
        key: of the one object.
        expires_at: with time zone; fractions of its second are cut off.
        file_bytes: the exact size of what may be put.
        media_type: of what is put or got.
        file_sha256: of what is put, in hexadecimal.
        filename: that what is got is saved as.
    """

    method: Literal["PUT", "GET"]
    document_id: UUID
    key: str
    expires_at: datetime
    file_bytes: int | None = None
    media_type: str | None = None
    file_sha256: str | None = None
    filename: str | None = None


@dataclass(frozen=True, slots=True)
class UrlSigner:
    """Makes and reads tokens; those of another secret are refused."""

    secret: bytes = field(repr=False)

    def sign(self, grant: Grant) -> str:
        """The token of a grant; made of characters that need no escaping in a URL."""
        granted = {
            "m": grant.method,
            "d": str(grant.document_id),
            "k": validate_key(grant.key),
            "e": int(grant.expires_at.timestamp()),
            "b": grant.file_bytes,
            "t": grant.media_type,
            "s": grant.file_sha256,
            "n": grant.filename,
        }
        told = {name: value for name, value in granted.items() if value is not None}
        text = _encoded(json.dumps(told, separators=(",", ":")).encode())
        return f"{text}.{self._signature(text)}"

    def verify(self, token: str, *, method: str, now: datetime) -> Grant:
        """What a token grants. Whose document a path names is for the caller to compare.

        Args:
            token: as it came.
            method: of the request.
            now: with time zone.

        Raises:
            PipelineError: `SIGNED_URL_INVALID` where it is none of ours, was changed, or is for another method;
                `SIGNED_URL_EXPIRED` from `expires_at` on.
        """
        text, _, signature = token.partition(".")
        # Texts are compared, not what they decode to: of some bytes there are several spellings.
        if len(token) > MAX_TOKEN_CHARS or not hmac.compare_digest(
            signature.encode("utf-8", "surrogatepass"), self._signature(text).encode()
        ):
            raise invalid_url()
        grant = _grant(text)
        if grant.method != method:
            raise PipelineError(
                ErrorCode.SIGNED_URL_INVALID,
                f"This URL is for {grant.method} only.",
                {"method": method, "allowed": grant.method},
            )
        if now >= grant.expires_at:
            raise PipelineError(
                ErrorCode.SIGNED_URL_EXPIRED,
                f"This URL was good until {grant.expires_at.isoformat()}. Ask for a new one.",
                {"expired_at": grant.expires_at.isoformat()},
            )
        return grant

    def _signature(self, text: str) -> str:
        signed = _PURPOSE + text.encode("utf-8", "surrogatepass")
        return _encoded(hmac.digest(self.secret, signed, hashlib.sha256))


def open_signer(settings: Settings) -> UrlSigner:
    """The signer with the secret of the settings, or else with the home's own.

    Raises:
        PipelineError: `SETTING_INVALID` where the home's secret cannot be used.
    """
    given = settings.signing_secret.get_secret_value()
    return UrlSigner(given.encode() or own_secret(settings.home, SECRET_FILE))


def invalid_url() -> PipelineError:
    """The error for a URL whose token is not one of ours, or not one for this path: it does not tell which."""
    return PipelineError(
        ErrorCode.SIGNED_URL_INVALID,
        "This URL is not one that was handed out: it must be used exactly as it was given. Ask for a new one.",
    )


def _grant(text: str) -> Grant:
    try:
        told: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return Grant(
            method=told["m"],
            document_id=UUID(told["d"]),
            key=told["k"],
            expires_at=datetime.fromtimestamp(told["e"], UTC),
            file_bytes=told.get("b"),
            media_type=told.get("t"),
            file_sha256=told.get("s"),
            filename=told.get("n"),
        )
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        # Signed by us, so another version of this service means something else by it.
        raise invalid_url() from error


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
