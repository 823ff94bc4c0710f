"""AWS Signature Version 4, of the two kinds that S3 takes: in a URL's query and in a request's headers.

After "Signature Calculations for the Authorization Header" and "Authenticating Requests: Using Query Parameters" in
the API reference of S3.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote

ALGORITHM = "AWS4-HMAC-SHA256"

_UNRESERVED = "-_.~"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Keys that sign.

    Attributes:
        session_token: beside temporary keys; else empty.
    """

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)


def escaped(text: str) -> str:
    """Percent-encoded as signatures want it."""
    return quote(text, safe=_UNRESERVED)


def canonical_query(parameters: Mapping[str, str]) -> str:
    """A query in the one spelling and order that is signed."""
    return "&".join(
        f"{name}={value}" for name, value in sorted((escaped(n), escaped(v)) for n, v in parameters.items())
    )


def string_to_sign(
    algorithm: str,
    *,
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    payload: str,
    stamp: str,
    scope: str,
) -> str:
    """What of a request is signed, in the way that AWS has made and Google follows; see `signature`."""
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = "\n".join([method, path, query, lines, ";".join(sorted(headers)), payload])
    return "\n".join([algorithm, stamp, scope, hashlib.sha256(request.encode()).hexdigest()])


def signature(
    secret_access_key: str,
    *,
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    payload: str,
    stamp: str,
    scope: str,
) -> str:
    """The signature of a request, in hexadecimal.

    Args:
        secret_access_key: signs.
        method: of the request.
        path: percent-encoded.
        query: as `canonical_query` gives it.
        headers: that are signed, by lower-case name; single spaces only, none at the ends.
        payload: sha256 of the body in hexadecimal, or `UNSIGNED-PAYLOAD`.
        stamp: the time, as `20261121T150000Z`.
        scope: `<date>/<region>/<service>/aws4_request`.
    """
    to_sign = string_to_sign(
        ALGORITHM, method=method, path=path, query=query, headers=headers, payload=payload, stamp=stamp, scope=scope
    )
    key = f"AWS4{secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, to_sign.encode(), "sha256").hex()


def signed_headers(
    credentials: Credentials,
    region: str,
    *,
    method: str,
    host: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    body: bytes,
    now: datetime | None = None,
) -> dict[str, str]:
    """The headers of a request to S3, with those that sign it; all of them are bound.

    Args:
        credentials: of the caller.
        region: of the bucket.
        method: of the request.
        host: with its port, as the request names it.
        path: percent-encoded.
        query: its parameters.
        headers: that it has besides, by lower-case name.
        body: what it sends.
        now: the time; None takes the clock's.
    """
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    payload = hashlib.sha256(body).hexdigest()
    bound = {**headers, "host": host, "x-amz-content-sha256": payload, "x-amz-date": stamp}
    if credentials.session_token:
        bound["x-amz-security-token"] = credentials.session_token
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    signed = signature(
        credentials.secret_access_key,
        method=method,
        path=path,
        query=canonical_query(query),
        headers=bound,
        payload=payload,
        stamp=stamp,
        scope=scope,
    )
    names = ";".join(sorted(bound))
    return bound | {
        "authorization": f"{ALGORITHM} Credential={credentials.access_key_id}/{scope}, "
        f"SignedHeaders={names}, Signature={signed}"
    }
