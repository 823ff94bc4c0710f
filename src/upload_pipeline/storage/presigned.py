"""Presigned S3 URLs that bind what is sent (type, length, content) and how a browser shows what it gets.

obstore signs the host and the expiry only, so whoever holds such a URL may put any number of bytes of any type.
Here its URL is taken for what only obstore knows (address, region, access key, session token) and signed again
with more in it. That needs the secret key, which obstore hands out for no credentials that it fetched itself.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import obstore
from obstore.store import S3Store

from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.encryption import AES256, Encryption
from upload_pipeline.storage.objects import SignedUrl
from upload_pipeline.storage.sigv4 import canonical_query, signature


@dataclass(frozen=True, slots=True)
class Presigner:
    """Presigns requests for the objects of a place on S3.

    Attributes:
        place: the bucket, with its prefix.
        access_key_id: the key that `secret_access_key` belongs to.
        secret_access_key: signs; never part of a URL or a message.
        encryption: that a PUT must ask for.
    """

    place: S3Store
    access_key_id: str
    secret_access_key: str = field(repr=False)
    encryption: Encryption = AES256

    async def put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None,
        expires_in: timedelta,
        caller_token: str | None = None,
    ) -> SignedUrl | None:
        """A PUT of just these bytes as that type; `None` where obstore signs with other credentials."""
        headers = {"content-type": media_type, "content-length": str(file_bytes), **self.encryption.headers()}
        if file_sha256 is not None:
            # S3 computes the sum of what arrives and refuses other bytes (BadDigest).
            headers["x-amz-checksum-sha256"] = b64encode(bytes.fromhex(file_sha256)).decode()
        else:
            # Nobody has said which bytes are to come, so the first that come stay: a second PUT is refused (412), and
            # what was looked at is what is kept.
            headers["if-none-match"] = "*"
        url = await self._sign("PUT", key, expires_in, headers=headers, query={})
        return None if url is None else SignedUrl(url, headers)

    async def get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None = None
    ) -> SignedUrl | None:
        """A GET that a browser saves under the name; `None` where obstore signs with other credentials."""
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

    async def _sign(
        self,
        method: Literal["GET", "PUT"],
        key: str,
        expires_in: timedelta,
        *,
        headers: Mapping[str, str],
        query: Mapping[str, str],
    ) -> str | None:
        url = await obstore.sign_async(self.place, method, key, expires_in)
        parameters = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
        if parameters["X-Amz-Credential"].partition("/")[0] != self.access_key_id:
            return None
        return sign_again(url, method, self.secret_access_key, headers=headers, query=query)


def sign_again(
    url: str, method: str, secret_access_key: str, *, headers: Mapping[str, str], query: Mapping[str, str]
) -> str:
    """Signs a presigned URL anew, with more headers and query parameters bound (AWS Signature Version 4).

    Args:
        url: presigned by query parameters, for the host only.
        method: of the request.
        secret_access_key: of the key that the URL names.
        headers: what the request must send, by lower-case name; single spaces only, none at the ends.
        query: parameters to add.
    """
    parts = urlsplit(url)
    bound = {"host": parts.netloc, **headers}
    names = ";".join(sorted(bound))
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True)) | dict(query) | {"X-Amz-SignedHeaders": names}
    del parameters["X-Amz-Signature"]
    wanted = canonical_query(parameters)
    signed = signature(
        secret_access_key,
        method=method,
        path=parts.path,
        query=wanted,
        headers=bound,
        payload="UNSIGNED-PAYLOAD",
        stamp=parameters["X-Amz-Date"],
        scope=parameters["X-Amz-Credential"].partition("/")[2],
    )
    return urlunsplit(parts._replace(query=f"{wanted}&X-Amz-Signature={signed}"))
