"""A server that speaks Google Cloud Storage's XML API, with tokens and signed URLs checked against an account's key.

    python -m tests.simulators.gcs --port 8400 --bucket files --key-file /tmp/account.json

The key file, in the form of Google's own, is written for clients to read. Faults: see `object_server`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import jwt
from aiohttp import web
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.simulators.object_server import Bucket, Fault, ObjectServer
from tests.simulators.xml_wire import XmlWire, refused

EMAIL = "pipeline@project.iam.gserviceaccount.com"
POWERLESS = "powerless@project.iam.gserviceaccount.com"
"""An account with the same key that may do nothing."""


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@dataclass
class GoogleStorage(ObjectServer):
    """The server; see `ObjectServer`. `key` is the service account's."""

    key: rsa.RSAPrivateKey = field(default_factory=_new_key, repr=False)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """The buckets, at the root."""
        self._wire = XmlWire(self.buckets, header="x-goog-", forgiving=False)
        router.add_route("*", "/{bucket}", self._answer)
        router.add_route("*", "/{bucket}/{key:.*}", self._answer)

    def refusal(self, fault: Fault) -> web.Response:
        """As Google words it."""
        if fault is Fault.SLOW_DOWN:
            return refused(429, "SlowDown", "Please reduce your request rate.")
        return refused(503 if fault is Fault.TIMEOUT else 500, "InternalError", "We encountered an internal error.")

    def account(self, email: str = EMAIL, key: rsa.RSAPrivateKey | None = None) -> str:
        """A key file of a service account."""
        pem = (key or self.key).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        told = {"type": "service_account", "private_key_id": "1", "private_key": pem.decode(), "client_email": email}
        return json.dumps({**told, "project_id": "project", "client_id": "1"})

    async def _answer(self, request: web.Request) -> web.Response:
        code = self._fault_of_url(request) if "X-Goog-Signature" in request.query else self._fault_of_token(request)
        bucket = self.buckets.get(request.match_info["bucket"])
        if request.method == "GET" and request.match_info.get("key") and bucket is not None and bucket.public:
            code = None
        if code is not None:
            await request.read()
            return refused(401 if code == "AuthenticationRequired" else 403, code, "refused by the check")
        least, _, most = request.headers.get("x-goog-content-length-range", "0,999999999999").partition(",")
        if not int(least) <= len(await request.read()) <= int(most):
            return refused(400, "EntityTooLarge", "The length is not in the range.")
        return await self._wire.answer(request, request.match_info["bucket"], request.match_info.get("key", ""))

    def _fault_of_token(self, request: web.Request) -> str | None:
        try:
            bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
            claims = jwt.decode(bearer, self.key.public_key(), algorithms=["RS256"])
        except jwt.InvalidTokenError:
            return "AuthenticationRequired"
        return None if claims["iss"] == EMAIL else "AccessDenied"

    def _fault_of_url(self, request: web.Request) -> str | None:
        query: Mapping[str, str] = request.query
        begin = datetime.strptime(query["X-Goog-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if datetime.now(UTC) > begin + timedelta(seconds=int(query["X-Goog-Expires"])):
            return "ExpiredToken"
        names = query["X-Goog-SignedHeaders"].split(";")
        headers = "".join(f"{name}:{request.headers.get(name, '')}\n" for name in names)
        pairs = sorted(
            (quote(name, safe=""), quote(value, safe="")) for name, value in query.items() if name != "X-Goog-Signature"
        )
        asked = "&".join(f"{name}={value}" for name, value in pairs)
        canonical = "\n".join(
            [request.method, request.rel_url.raw_path, asked, headers, ";".join(names), "UNSIGNED-PAYLOAD"]
        )
        email, _, scope = query["X-Goog-Credential"].partition("/")
        digest = sha256(canonical.encode()).hexdigest()
        text = "\n".join(["GOOG4-RSA-SHA256", query["X-Goog-Date"], scope, digest])
        try:
            signature = bytes.fromhex(query["X-Goog-Signature"])
            self.key.public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
        except (InvalidSignature, ValueError):
            return "SignatureDoesNotMatch"
        # A header of Google's own that is not signed is no part of the permission.
        if any(name.lower().startswith("x-goog-") and name.lower() not in names for name in request.headers):
            return "SignatureDoesNotMatch"
        return None if email == EMAIL else "AccessDenied"


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append", default=[], help="may be given again")
    parser.add_argument("--key-file", type=Path, required=True, help="where the account's key is written")
    options = parser.parse_args()

    async def serve() -> None:
        server = GoogleStorage(port=options.port, buckets={name: Bucket() for name in options.bucket})
        options.key_file.write_text(server.account())
        async with server:
            print(server.url, flush=True)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
