"""Signed URLs of Google Cloud Storage that bind what is sent (type, length) and how a browser shows what it gets.

obstore binds the host and the expiry only; see `presigned`. Here its URL is signed again with more in it, by the
service account's own key. An account without one (of a machine, or by workload identity) could sign only by asking
Google for each URL, which is not done: such stores sign none.

The content's sha256 cannot be bound, as of sums Google knows MD5 and CRC32C. So a PUT makes an object and replaces
none: what a job and a scanner have looked at is what stays, though the URL is good for minutes yet. Where an object
stands already no URL is signed, as it could only be refused: this service's own takes its place, which looks at what
comes before it replaces anything.
Source: Cloud Storage, "V4 signing process with Cloud Storage tools" and "Extension headers".
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import obstore
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from obstore.store import GCSStore

from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.objects import SignedUrl
from upload_pipeline.storage.sigv4 import canonical_query, string_to_sign

LENGTH_HEADER = "x-goog-content-length-range"
GENERATION_HEADER = "x-goog-if-generation-match"

# As obstore reads them: the first that is set wins. The first is the key itself, the others name its file.
_KEY_VARIABLE = "GOOGLE_SERVICE_ACCOUNT_KEY"
_FILE_VARIABLES = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS")


@dataclass(frozen=True, slots=True)
class AccountKey:
    """The key of a service account.

    Attributes:
        email: of the account.
        private_key: signs; never part of a URL or a message.
    """

    email: str
    private_key: RSAPrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class GoogleUrls:
    """Signs URLs for the objects of a bucket.

    Attributes:
        place: the bucket, with its prefix, as this process reaches it.
        shown: the same as clients do.
        key: of the service account that both work as.
    """

    place: GCSStore
    shown: GCSStore
    key: AccountKey

    async def put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None,
        expires_in: timedelta,
        caller_token: str | None,
    ) -> SignedUrl | None:
        """A PUT of just this many bytes as that type, as long as nothing stands there.

        `None` where something does, or where obstore works as another account.
        """
        if await self._stands(key):
            return None
        headers = {
            "content-type": media_type,
            LENGTH_HEADER: f"{file_bytes},{file_bytes}",
            GENERATION_HEADER: "0",
        }
        url = await self._sign("PUT", key, expires_in, headers=headers, query={})
        return None if url is None else SignedUrl(url, headers)

    async def get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None
    ) -> SignedUrl | None:
        """A GET that a browser saves under the name; `None` where obstore works as another account."""
        query = {"response-content-disposition": attachment(filename)}
        if media_type is not None:
            query["response-content-type"] = media_type
        url = await self._sign("GET", key, expires_in, headers={}, query=query)
        return None if url is None else SignedUrl(url, {})

    async def check(self) -> str:
        """Nothing has to be asked."""
        return "clients get URLs of the bucket"

    async def close(self) -> None:
        """Nothing is open between calls."""

    async def _stands(self, key: str) -> bool:
        try:
            await obstore.head_async(self.place, key)
        except FileNotFoundError:
            return False
        return True

    async def _sign(
        self,
        method: Literal["GET", "PUT"],
        key: str,
        expires_in: timedelta,
        *,
        headers: Mapping[str, str],
        query: Mapping[str, str],
    ) -> str | None:
        url = await obstore.sign_async(self.shown, method, key, expires_in)
        if not _parameters(url)["X-Goog-Credential"].startswith(f"{self.key.email}/"):
            return None
        # A millisecond of work for RSA, which no other request should wait for.
        return await asyncio.to_thread(sign_again, url, method, self.key, headers=headers, query=query)


def sign_again(url: str, method: str, key: AccountKey, *, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
    """Signs a URL of obstore's anew, with more headers and query parameters bound.

    Args:
        url: signed for the host only.
        method: of the request.
        key: of the account that the URL names.
        headers: what the request must send, by lower-case name; single spaces only, none at the ends.
        query: parameters to add.
    """
    parts = urlsplit(url)
    bound = {"host": parts.netloc, **headers}
    parameters = {**_parameters(url), **query, "X-Goog-SignedHeaders": ";".join(sorted(bound))}
    del parameters["X-Goog-Signature"]
    wanted = canonical_query(parameters)
    to_sign = string_to_sign(
        parameters["X-Goog-Algorithm"],
        method=method,
        path=parts.path,
        query=wanted,
        headers=bound,
        payload="UNSIGNED-PAYLOAD",
        stamp=parameters["X-Goog-Date"],
        scope=parameters["X-Goog-Credential"].partition("/")[2],
    )
    signature = key.private_key.sign(to_sign.encode(), padding.PKCS1v15(), hashes.SHA256())
    return urlunsplit(parts._replace(query=f"{wanted}&X-Goog-Signature={signature.hex()}"))


def _parameters(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def account_key(environment: Mapping[str, str]) -> AccountKey | None:
    """The key that the environment names; `None` where it names none, or something else than a service account.

    Raises:
        ValueError: it names a key that cannot be read.
        OSError: it names a file that cannot be read.
    """
    text = environment.get(_KEY_VARIABLE, "")
    for name in _FILE_VARIABLES:
        if not text and environment.get(name):
            text = Path(environment[name]).read_text(encoding="utf-8")
    if not text:
        return None
    told = json.loads(text)
    if not isinstance(told, dict) or "private_key" not in told or told.get("disable_oauth"):
        return None
    private_key = serialization.load_pem_private_key(str(told["private_key"]).encode(), password=None)
    if not isinstance(private_key, RSAPrivateKey):
        raise ValueError("the service account's private_key is none of RSA")
    return AccountKey(str(told.get("client_email", "")), private_key)
