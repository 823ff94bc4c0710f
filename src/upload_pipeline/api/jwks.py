"""The public keys of an issuer of tokens, fetched over HTTP and kept for a while.

Supabase publishes them at `<issuer>/.well-known/jwks.json` with max-age 600 and shows a new key there before it signs
with it. So keys are kept for ten minutes at most, looked up anew in the background after five, and at once where a
token names a key that is not among them; that last only now and then, or whoever sends made-up names would make us
hammer the issuer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import structlog
from jwt import PyJWK, PyJWTError

from upload_pipeline.errors import ErrorCode, PipelineError

log = structlog.get_logger(__name__)

KEEP_SECONDS = 600.0
"""Longest that a key is trusted after it was seen: one that the issuer has revoked is gone by then."""
REFRESH_SECONDS = 300.0
"""Age at which keys are looked up anew in the background, so that a short outage of the issuer is not felt."""
UNKNOWN_KEY_COOLDOWN = 30.0
"""Shortest time between two fetches because of a key that is not known."""
FAILURE_COOLDOWN = 5.0
"""Shortest time between two fetches while the issuer does not answer."""

_FETCH_SECONDS = 5.0
_MAX_BYTES = 256 * 1024
_MIN_RSA_BITS = 2048
_ALGORITHMS: dict[tuple[str, object], str] = {("EC", "P-256"): "ES256", ("RSA", None): "RS256"}

Fetch = Callable[[], Awaitable[bytes]]


class JwksCache:
    """The keys of one issuer by their names (`kid`). Never blocks the event loop; one fetch at a time."""

    def __init__(self, fetch: Fetch, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._keys: dict[str, PyJWK] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str) -> PyJWK | None:
        """The key of that name; None where the issuer has none.

        Raises:
            PipelineError: `ISSUER_UNAVAILABLE` where no keys are known that are recent enough.
        """
        age = self._clock() - self._fetched_at
        if age > KEEP_SECONDS:
            self._keys = {}
            await self._refresh(FAILURE_COOLDOWN)
            if self._clock() - self._fetched_at > KEEP_SECONDS:
                raise PipelineError(
                    ErrorCode.ISSUER_UNAVAILABLE,
                    "The keys of the tokens' issuer cannot be fetched. Check UPLOAD_PIPELINE_JWT_JWKS_URL and "
                    "UPLOAD_PIPELINE_JWT_ISSUER, and that this machine reaches it.",
                )
        elif kid not in self._keys:
            await self._refresh(UNKNOWN_KEY_COOLDOWN)
        elif age > REFRESH_SECONDS:
            self._start(FAILURE_COOLDOWN)
        return self._keys.get(kid)

    async def close(self) -> None:
        """Ends a fetch that is under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])

    async def _refresh(self, cooldown: float) -> None:
        task = self._start(cooldown)
        if task is not None:
            # Shielded by `wait`: a caller that leaves does not end the fetch that others wait for.
            await asyncio.wait([task])

    def _start(self, cooldown: float) -> asyncio.Task[None] | None:
        """The fetch that is under way, or a new one; None where the last one is too short a time ago."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        if self._clock() - self._tried_at < cooldown:
            return None
        self._tried_at = self._clock()
        self._fetching = asyncio.create_task(self._update(), name="jwks")
        return self._fetching

    async def _update(self) -> None:
        try:
            keys = read_keys(await self._fetch())
        except Exception as error:  # noqa: BLE001 - whatever an issuer answers, the keys that are known stay for their time
            log.warning("jwks_not_fetched", error=str(error) or type(error).__name__)
            return
        self._keys = keys
        self._fetched_at = self._clock()
        log.info("jwks_fetched", keys=sorted(keys))


def http_fetch(session: aiohttp.ClientSession, url: str) -> Fetch:
    """Fetches a JWKS document: bounded in time and size, no redirects.

    Args:
        session: open for as long as the result is used.
        url: of the document.
    """

    async def fetch() -> bytes:
        async with session.get(
            url, timeout=aiohttp.ClientTimeout(total=_FETCH_SECONDS), allow_redirects=False
        ) as response:
            if response.status != 200:
                raise ValueError(f"{url} answers with status {response.status}")
            # Read to one byte more than is taken, whatever length is announced.
            body = bytearray()
            async for block in response.content.iter_chunked(64 * 1024):
                body += block
                if len(body) > _MAX_BYTES:
                    raise ValueError(f"{url} answers with more than {_MAX_BYTES} bytes")
            return bytes(body)

    return fetch


def read_keys(document: bytes) -> dict[str, PyJWK]:
    """The keys of a JWKS document (RFC 7517) that can check signatures by ES256 or RS256, by name.

    What else it holds is passed over: symmetric keys above all, which would let whoever reads them sign.

    Raises:
        ValueError: it is no JWKS document.
    """
    parsed: Any = json.loads(document)
    listed = parsed.get("keys") if isinstance(parsed, dict) else None
    if not isinstance(listed, list):
        raise ValueError("the document is no JWKS: it has no list `keys`")
    keys: dict[str, PyJWK] = {}
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(kid := entry.get("kid"), str) or not kid:
            continue
        algorithm = _ALGORITHMS.get((str(entry.get("kty")), entry.get("crv")))
        if algorithm is None or entry.get("alg", algorithm) != algorithm or entry.get("use", "sig") != "sig":
            continue
        public = {name: value for name, value in entry.items() if name in ("kty", "crv", "x", "y", "n", "e", "kid")}
        try:
            key = PyJWK(public, algorithm)
        except (PyJWTError, ValueError, TypeError, KeyError) as error:
            log.warning("jwks_key_skipped", kid=kid, error=str(error))
            continue
        if algorithm == "RS256" and key.key.key_size < _MIN_RSA_BITS:
            log.warning("jwks_key_skipped", kid=kid, error=f"shorter than {_MIN_RSA_BITS} bits")
            continue
        keys[kid] = key
    return keys
