"""Credentials that must not pass, by name; the issuer signs by ES256 and publishes its keys, unless said otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable

import jwt
from issuer import SECRET, USER, claims, ec_key, forged, public_pem, rsa_key, signed

_LONG_AGO = int(time.time()) - 3600

ATTACKS: dict[str, Callable[[], str]] = {
    "expired": lambda: signed(claims(exp=_LONG_AGO)),
    "expired a minute ago": lambda: signed(claims(exp=int(time.time()) - 60)),
    "no expiry": lambda: signed(claims(exp=None)),
    "not valid yet": lambda: signed(claims(nbf=int(time.time()) + 3600)),
    "wrong audience": lambda: signed(claims(aud="anon")),
    "no audience": lambda: signed(claims(aud=None)),
    "wrong issuer": lambda: signed(claims(iss="https://evil.example.com/auth/v1")),
    "no issuer": lambda: signed(claims(iss=None)),
    "no subject": lambda: signed(claims(sub=None)),
    "subject that is no user id": lambda: signed(claims(sub="admin")),
    "subject that is nobody": lambda: signed(claims(sub="00000000-0000-0000-0000-000000000000")),
    "service role": lambda: signed(claims(role="service_role")),
    "anonymous role": lambda: signed(claims(role="anon")),
    "somebody else's key under a good name": lambda: signed(claims(), ec_key(1)),
    "unknown key": lambda: signed(claims(), ec_key(1), kid="unknown"),
    "no key named": lambda: signed(claims(), kid=None),
    "key of another family": lambda: signed(claims(), rsa_key(), algorithm="RS256", kid="ec"),
    "shared secret under a published name": lambda: signed(claims(), SECRET, algorithm="HS256", kid="ec"),
    "algorithm none": lambda: forged({"alg": "none", "typ": "JWT", "kid": "ec"}, claims()),
    "algorithm NONE": lambda: forged({"alg": "NONE", "kid": "ec"}, claims()),
    "no algorithm": lambda: forged({"kid": "ec"}, claims()),
    "public key as the secret of HS256": lambda: forged({"alg": "HS256", "kid": "ec"}, claims(), public_pem()),
    "key within the token": lambda: jwt.encode(
        claims(), ec_key(1), algorithm="ES256", headers={"kid": "x", "jwk": {"kty": "EC"}, "jku": "http://evil.test"}
    ),
    "signature cut off": lambda: signed(claims()).rsplit(".", 1)[0] + ".",
    "payload changed": lambda: _with_payload_of(signed(claims()), signed(claims(sub=str(USER).replace("1", "2")))),
    "header of deep nesting": lambda: forged(b'{"alg":' + b"[" * 5000 + b"]" * 5000 + b"}", claims()),
    "header that is a list": lambda: forged(b"[]", claims()),
    "kid that is no text": lambda: forged({"alg": "ES256", "kid": {"a": 1}}, claims()),
    "critical header": lambda: jwt.encode(claims(), ec_key(), algorithm="ES256", headers={"kid": "ec", "crit": ["x"]}),
    "not a token": lambda: "hello",
    "two dots": lambda: "..",
    "very long": lambda: "a" * 20_000 + ".b.c",
}


def _with_payload_of(one: str, other: str) -> str:
    header, _, signature = one.split(".")
    return ".".join((header, other.split(".")[1], signature))
