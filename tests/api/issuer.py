"""Somebody who signs tokens, well and badly, and publishes keys on a real socket."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from uuid import UUID

import jwt
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER = "https://project.example.com/auth/v1"
USER = UUID("11111111-1111-4111-8111-111111111111")
SECRET = "a shared secret, longer than the sixty-four bytes that HS512 asks for: enough"


@cache
def ec_key(number: int = 0) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good token, with changes; None leaves one out."""
    now = int(time.time())
    good = {
        "iss": ISSUER,
        "aud": "authenticated",
        "sub": str(USER),
        "role": "authenticated",
        "iat": now,
        "exp": now + 3600,
        "app_metadata": {"roles": ["ADMIN"]},
        "user_metadata": {"roles": ["SUPERUSER"]},
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


def signed(payload: dict[str, Any], key: Any = None, *, algorithm: str = "ES256", kid: str | None = "ec") -> str:
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(payload, ec_key() if key is None else key, algorithm=algorithm, headers=headers)


def forged(header: dict[str, Any] | bytes, payload: dict[str, Any], secret: bytes = b"") -> str:
    """A token that no library would make: any header, signed by HMAC-SHA256 where there is a secret."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = f"{_encoded(raw)}.{_encoded(json.dumps(payload).encode())}"
    signature = hmac.new(secret, body.encode(), hashlib.sha256).digest() if secret else b""
    return f"{body}.{_encoded(signature)}"


def public_pem() -> bytes:
    return (
        ec_key().public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def jwk(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    made = ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
    return {**made.to_jwk(key.public_key(), as_dict=True), "kid": kid, **more}


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@dataclass
class JwksServer:
    """Publishes keys.

    Attributes:
        url: of the document.
        keys: that it publishes now.
        status: that it answers with.
        asked: how often it was asked.
    """

    url: str = ""
    keys: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    asked: int = 0


@asynccontextmanager
async def jwks_server() -> AsyncIterator[JwksServer]:
    server = JwksServer(keys=[jwk(ec_key(), "ec", alg="ES256", use="sig"), jwk(rsa_key(), "rsa", alg="RS256")])

    async def answer(_request: web.Request) -> web.Response:
        server.asked += 1
        return web.json_response({"keys": server.keys}, status=server.status)

    app = web.Application()
    app.add_routes([web.get("/jwks.json", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks.json"
    try:
        yield server
    finally:
        await runner.cleanup()
