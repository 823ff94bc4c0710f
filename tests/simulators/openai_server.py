"""What the simulated servers of OpenAI's API share: the key, the minutes, the error bodies, and bad days on demand.

A simulator derives from `OpenAIServer` and adds its routes. Books are at `GET /books`, faults are asked for by
`POST /misbehave`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import uuid4

from aiohttp import web

KEY = "sk-simulated"
"""The API key that is accepted."""

UNPAID = ("rate_limited", "quota", "server_error", "unauthorised", "hang", "rejected")
"""Faults of an answer that each simulator knows; they come before anything is paid for."""


@dataclass
class Traffic:
    """What every simulator's books tell.

    Attributes:
        requests: all that came.
        answered: those that were answered by 200.
        tokens: paid for.
        over_limit: requests refused since a minute was full; a client with a true budget causes none.
        faults: what was done wrong, and how often.
        most_in_flight: most requests at once.
    """

    requests: int = 0
    answered: int = 0
    tokens: int = 0
    over_limit: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    most_in_flight: int = 0

    def as_json(self) -> dict[str, Any]:
        """What `GET /books` shows."""
        return dict(vars(self))


@dataclass
class Window:
    """A minute that slides: what was let in counts for `seconds`.

    Attributes:
        used: what counts.
        most: the most that ever did at once.
    """

    limit: int
    seconds: float
    clock: Callable[[], float]
    _let_in: deque[tuple[float, int]] = field(default_factory=deque)
    used: int = 0
    most: int = 0

    def remaining(self) -> int:
        """What would be let in now."""
        now = self.clock()
        while self._let_in and self._let_in[0][0] <= now - self.seconds:
            self.used -= self._let_in.popleft()[1]
        return self.limit - self.used

    def take(self, amount: int) -> None:
        """Lets in."""
        self.remaining()
        self._let_in.append((self.clock(), amount))
        self.used += amount
        self.most = max(self.most, self.used)

    def reset(self) -> float:
        """Seconds until all is free again."""
        self.remaining()
        return max(0.0, self._let_in[-1][0] + self.seconds - self.clock()) if self._let_in else 0.0


@dataclass
class OpenAIServer(ABC):
    """A server: `async with …Simulator(…) as simulator: simulator.url`.

    Attributes:
        requests_per_minute: refused beyond it.
        tokens_per_minute: refused beyond it.
        minute: seconds of the windows.
        latency: seconds that an answer takes.
        faults: share of requests for each fault, by `seed`.
        retry_after: what a 429 by fault says.
        counts_failed: whether a request that fails before anything is paid for has its place in the minute all the
            same; of the real one nobody says.
        tells_too_large: whether a request that is larger than a whole minute is told from one that came too early: by
            the message alone, and without headers, as OpenAI does.
        clock: seconds that only grow.
        port: to listen on; 0 takes any that is free.
    """

    requests_per_minute: int = 1_000_000
    tokens_per_minute: int = 1_000_000_000
    minute: float = 60.0
    latency: float = 0.0
    faults: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    retry_after: float = 1.0
    counts_failed: bool = False
    tells_too_large: bool = False
    clock: Callable[[], float] = time.monotonic
    port: int = 0
    url: str = ""
    _asked: deque[tuple[str, float | None]] = field(default_factory=deque)
    _in_flight: int = 0

    known_faults = UNPAID
    """The faults that may be asked for."""
    path = "/v1"
    """Of the route."""

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """The simulator's books."""

    def __post_init__(self) -> None:
        unknown = set(self.faults) - set(self.known_faults)
        if unknown:
            raise ValueError(f"there is no fault {', '.join(sorted(unknown))}")
        self._chance = random.Random(self.seed)
        self._requests = Window(self.requests_per_minute, self.minute, self.clock)
        self._tokens = Window(self.tokens_per_minute, self.minute, self.clock)

    async def __aenter__(self) -> Self:
        """Serves on the loopback address; `url` is then what a client takes as its base URL."""
        self._runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._runner.cleanup()

    def misbehave(self, fault: str, *, times: int = 1, retry_after: float | None = None) -> None:
        """The next `times` requests have this fault."""
        if fault not in self.known_faults:
            raise ValueError(f"there is no fault {fault!r}")
        self._asked.extend([(str(fault), retry_after)] * times)

    def behave(self) -> None:
        """Takes back what was asked for and is still to come, and all that comes by chance."""
        self._asked.clear()
        self.faults = {}

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post(self.path, self._serve)
        app.router.add_get("/books", self._show_books)
        app.router.add_post("/misbehave", self._ask_to_misbehave)
        return app

    @abstractmethod
    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """What a request with the right key is answered."""

    def next_fault(self) -> tuple[str | None, float | None]:
        """The fault of this request and, of a 429, the time that it tells; as asked for, or else by chance."""
        if self._asked:
            return self._asked.popleft()
        draw = self._chance.random()
        for name, share in self.faults.items():
            if draw < share:
                return name, None
            draw -= share
        return None, None

    @property
    def busiest_minute(self) -> int:
        """The most requests that counted in a minute."""
        return self._requests.most

    def full(self, model: object, tokens: int, fault: str | None = None) -> web.Response | None:
        """The refusal of a request for which a minute has no room; otherwise it has its place, if it counts."""
        if fault in UNPAID and not self.counts_failed:
            return None
        if self._requests.remaining() < 1 or self._tokens.remaining() < tokens:
            self.traffic.over_limit += 1
            if self.tells_too_large and tokens > self.tokens_per_minute:
                message = (
                    f"Request too large for {model} in organization org-simulated on tokens per min (TPM): Limit "
                    f"{self.tokens_per_minute}, Requested {tokens}. The input or output tokens must be reduced in "
                    "order to run successfully. Visit https://platform.openai.com/account/rate-limits to learn more."
                )
                return refusal(429, message, kind="tokens", code="rate_limit_exceeded")
            kind = "requests" if self._requests.remaining() < 1 else "tokens"
            message = f"Rate limit reached for {model} on {kind} per min. Please try again in 1s."
            return refusal(429, message, kind=kind, code="rate_limit_exceeded", headers=self.headers())
        self._requests.take(1)
        self._tokens.take(tokens)
        return None

    async def unpaid(self, request: web.Request, fault: str, retry_after: float | None) -> web.Response:
        """The answer with one of the faults `UNPAID`."""
        match fault:
            case "hang":
                await until_gone(request)
                return web.Response()
            case "rate_limited":
                wait = self.retry_after if retry_after is None else retry_after
                headers = {**self.headers(), "retry-after": f"{wait:g}"}
                message = f"Rate limit reached on tokens per min (TPM). Please try again in {wait:g}s."
                return refusal(429, message, kind="tokens", code="rate_limit_exceeded", headers=headers)
            case "quota":
                message = "You exceeded your current quota, please check your plan and billing details."
                return refusal(429, message, kind="insufficient_quota", code="insufficient_quota")
            case "unauthorised":
                return refusal(401, "Incorrect API key provided.", code="invalid_api_key")
            case "rejected":
                return refusal(400, "The input is not taken.")
            case _:
                message = "The server had an error while processing your request. Sorry about that!"
                return refusal(500, message, kind="server_error")

    def headers(self) -> dict[str, str]:
        """What an answer tells of the minutes."""
        return {
            "x-request-id": f"req_{uuid4().hex}",
            "openai-processing-ms": str(int(self.latency * 1000)),
            "x-ratelimit-limit-requests": str(self._requests.limit),
            "x-ratelimit-limit-tokens": str(self._tokens.limit),
            "x-ratelimit-remaining-requests": str(max(0, self._requests.remaining())),
            "x-ratelimit-remaining-tokens": str(max(0, self._tokens.remaining())),
            "x-ratelimit-reset-requests": _go_duration(self._requests.reset()),
            "x-ratelimit-reset-tokens": _go_duration(self._tokens.reset()),
        }

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.traffic.requests += 1
        self._in_flight += 1
        self.traffic.most_in_flight = max(self.traffic.most_in_flight, self._in_flight)
        try:
            body = await request.json()
            if request.headers.get("Authorization") != f"Bearer {KEY}":
                return refusal(401, "Incorrect API key provided.", code="invalid_api_key")
            return await self.answer(request, body)
        finally:
            self._in_flight -= 1

    async def _show_books(self, request: web.Request) -> web.Response:
        del request
        return web.json_response(self.traffic.as_json())

    async def _ask_to_misbehave(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.misbehave(asked["fault"], times=asked.get("times", 1), retry_after=asked.get("retry_after"))
        return web.json_response({})


async def until_gone(request: web.Request) -> None:
    """Waits until the client has closed the connection."""
    while request.transport is not None and not request.transport.is_closing():
        await asyncio.sleep(0.05)


def refusal(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """An answer that is no success, as OpenAI words it."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return web.json_response(body, status=status, headers={"x-request-id": f"req_{uuid4().hex}", **(headers or {})})


def serve_by_name(simulator: type[OpenAIServer], document: str | None) -> None:
    """Serves as the command line says until it is interrupted; the first line that is printed is the URL."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--requests-per-minute", type=int, default=3000)
    parser.add_argument("--tokens-per-minute", type=int, default=1_000_000)
    parser.add_argument("--counts-failed", action="store_true", help="requests that fail, in the minute")
    parser.add_argument("--tells-too-large", action="store_true", help="of a request larger than a whole minute")
    parser.add_argument("--faults", type=json.loads, default={}, help='as {"rate_limited": 0.1, "dropped": 0.02}')
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())

    async def serve() -> None:
        async with simulator(**options) as running:
            print(running.url, flush=True)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


def _go_duration(seconds: float) -> str:
    """As Go writes it: `0s`, `12ms`, `1.5s`, `6m0s`."""
    if seconds >= 60:
        return f"{int(seconds // 60)}m{seconds % 60:.3g}s"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.4g}s"
    return f"{max(1, round(seconds * 1000))}ms"
