from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from issuer import ec_key, jwk

from upload_pipeline.api.jwks import (
    FAILURE_COOLDOWN,
    KEEP_SECONDS,
    REFRESH_SECONDS,
    UNKNOWN_KEY_COOLDOWN,
    JwksCache,
    http_fetch,
    read_keys,
)
from upload_pipeline.errors import ErrorCode, PipelineError


@dataclass
class Issuer:
    """An issuer whose time the test sets."""

    now: float = 1000.0
    names: list[str] = field(default_factory=lambda: ["one"])
    broken: bool = False
    asked: int = 0

    async def fetch(self) -> bytes:
        self.asked += 1
        await asyncio.sleep(0)
        if self.broken:
            raise OSError("the issuer is away")
        return json.dumps({"keys": [jwk(ec_key(), name) for name in self.names]}).encode()

    def cache(self) -> JwksCache:
        return JwksCache(self.fetch, clock=lambda: self.now)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_keys_are_fetched_once_and_then_kept() -> None:
    issuer = Issuer()
    cache = issuer.cache()
    for _ in range(3):
        assert await cache.find("one") is not None
    assert issuer.asked == 1


async def test_a_new_key_is_found_at_once_but_not_twice_within_the_cooldown() -> None:
    issuer = Issuer()
    cache = issuer.cache()
    await cache.find("one")
    issuer.names = ["one", "two"]
    issuer.now += UNKNOWN_KEY_COOLDOWN - 1
    assert await cache.find("two") is None
    issuer.now += 2
    assert await cache.find("two") is not None
    assert await cache.find("three") is None
    assert issuer.asked == 2


async def test_keys_are_renewed_in_the_background_before_they_are_too_old() -> None:
    issuer = Issuer()
    cache = issuer.cache()
    await cache.find("one")
    issuer.now += REFRESH_SECONDS + 1
    assert await cache.find("one") is not None
    await settled()
    assert issuer.asked == 2
    issuer.now += REFRESH_SECONDS - 1
    assert await cache.find("one") is not None
    assert issuer.asked == 2


async def test_a_key_that_was_withdrawn_is_trusted_for_ten_minutes_at_most() -> None:
    issuer = Issuer()
    cache = issuer.cache()
    await cache.find("one")
    issuer.broken = True
    issuer.now += KEEP_SECONDS - 1
    assert await cache.find("one") is not None
    issuer.now += 2 + FAILURE_COOLDOWN
    with pytest.raises(PipelineError) as raised:
        await cache.find("one")
    assert raised.value.code is ErrorCode.ISSUER_UNAVAILABLE
    issuer.broken, issuer.names = False, ["two"]
    issuer.now += FAILURE_COOLDOWN + 1
    assert await cache.find("one") is None
    assert await cache.find("two") is not None


async def test_an_issuer_that_is_away_is_asked_once_in_a_while() -> None:
    issuer = Issuer(broken=True)
    cache = issuer.cache()
    for _ in range(10):
        with pytest.raises(PipelineError):
            await cache.find("one")
    assert issuer.asked == 1
    issuer.now += FAILURE_COOLDOWN + 1
    issuer.broken = False
    assert await cache.find("one") is not None


async def test_a_caller_that_leaves_does_not_end_the_fetch_of_the_others() -> None:
    issuer = Issuer()
    cache = issuer.cache()
    leaving = asyncio.create_task(cache.find("one"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await cache.find("one") is not None
    assert issuer.asked == 1
    await cache.close()


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"keys": {}}', b"\xff", b"<html>"])
def test_what_is_no_jwks_document_is_an_error(document: bytes) -> None:
    with pytest.raises(ValueError):
        read_keys(document)


async def test_a_document_over_http_is_bounded_and_redirects_are_not_followed() -> None:
    async def large(_request: web.Request) -> web.Response:
        return web.Response(body=b" " * 300_000)

    async def moved(_request: web.Request) -> web.Response:
        raise web.HTTPFound("/good")

    async def good(_request: web.Request) -> web.Response:
        return web.Response(body=b'{"keys": []}')

    app = web.Application()
    app.add_routes([web.get("/large", large), web.get("/moved", moved), web.get("/good", good)])
    runner: Any = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        root = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            assert await http_fetch(session, f"{root}/good")() == b'{"keys": []}'
            for path in ("large", "moved"):
                with pytest.raises(ValueError):
                    await http_fetch(session, f"{root}/{path}")()
    finally:
        await runner.cleanup()
