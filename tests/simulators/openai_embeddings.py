"""A server that speaks OpenAI's `POST /v1/embeddings`: its limits, its error bodies, its rate limits, and its bad days.

    python -m tests.simulators.openai_embeddings --port 8100 --latency 0.05 --faults '{"rate_limited": 0.1}' --seed 7

The vector of a text is a function of the text alone. The books tell which texts were paid for, how often, and whose
answers never arrived; over HTTP they are at `GET /books`, and faults are asked for by `POST /misbehave`.

Tokens are counted roughly as cl100k does: a piece of up to six letters, of up to three digits, each other sign, and
two bytes of any other script are a token. The limit of a request is held against the larger of that and a quarter of
its bytes, since the real server guesses by bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any, Self
from uuid import uuid4

import numpy as np
from aiohttp import web

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 8192
MAX_REQUEST_TOKENS = 300_000
NATIVE_DIMENSIONS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}
KEY = "sk-simulated"
"""The API key that is accepted."""

_TOKENS = re.compile(r"[A-Za-z]{1,6}|[0-9]{1,3}|[!-~]|[^\x00-\x7f]")


class Fault(StrEnum):
    """How an answer can go wrong. What is done before it is paid for is marked so; the others are after."""

    RATE_LIMITED = "rate_limited"  # before: 429 and Retry-After
    QUOTA = "quota"  # before: 429 insufficient_quota
    SERVER_ERROR = "server_error"  # before: 500
    UNAUTHORISED = "unauthorised"  # before: 401
    HANG = "hang"  # before: no answer, ever
    REJECTED = "rejected"  # before: 400 that names no size
    DROPPED = "dropped"  # the connection is closed without an answer
    TRUNCATED = "truncated"  # half of the JSON
    SHUFFLED = "shuffled"  # each vector with its own index, in another order: allowed
    WRONG_INDEX = "wrong_index"  # one index twice, another never
    SHORT = "short"  # the last vector is missing
    NAN = "nan"  # a component that is no number
    WRONG_DIMENSIONS = "wrong_dimensions"  # one component less
    EMPTY = "empty"  # 200 and no vector at all


_UNPAID = {
    Fault.RATE_LIMITED,
    Fault.QUOTA,
    Fault.SERVER_ERROR,
    Fault.UNAUTHORISED,
    Fault.HANG,
    Fault.REJECTED,
}
_UNUSABLE = {Fault.DROPPED, Fault.TRUNCATED, Fault.WRONG_INDEX, Fault.SHORT, Fault.WRONG_DIMENSIONS, Fault.EMPTY}


@dataclass
class Books:
    """What was done and paid for.

    Attributes:
        paid: how often each text was paid for.
        lost: how often it was paid for and its vector never arrived, or not as one: the simulator's own doing, or
            the client was gone when the answer was ready.
        requests: all that came.
        answered: those that were answered by 200.
        tokens: paid for.
        over_limit: requests refused since a minute was full; a client with a true budget causes none.
        too_large: requests refused for their size.
        faults: what was done wrong, and how often.
        largest_inputs: most texts of one request.
        largest_tokens: most tokens of one request.
        most_in_flight: most requests at once.
    """

    paid: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    answered: int = 0
    tokens: int = 0
    over_limit: int = 0
    too_large: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    largest_inputs: int = 0
    largest_tokens: int = 0
    most_in_flight: int = 0

    def paid_again(self) -> dict[str, int]:
        """Texts that were paid for more often than once and once for each lost answer, and how much more often."""
        return {text: more for text, times in self.paid.items() if (more := times - 1 - self.lost[text]) > 0}

    def as_json(self) -> dict[str, Any]:
        """The same, each text as its SHA-256."""
        told = {name: value for name, value in vars(self).items() if name not in ("paid", "lost")}
        for name in ("paid", "lost"):
            told[name] = {sha256(text.encode()).hexdigest(): times for text, times in getattr(self, name).items()}
        return told


@dataclass
class Window:
    """A minute that slides: what was let in counts for `seconds`."""

    limit: int
    seconds: float
    clock: Callable[[], float]
    _let_in: deque[tuple[float, int]] = field(default_factory=deque)
    used: int = 0

    def remaining(self) -> int:
        """What would be let in now."""
        now = self.clock()
        while self._let_in and self._let_in[0][0] <= now - self.seconds:
            self.used -= self._let_in.popleft()[1]
        return self.limit - self.used

    def take(self, amount: int) -> None:
        """Lets in."""
        self._let_in.append((self.clock(), amount))
        self.used += amount

    def reset(self) -> float:
        """Seconds until all is free again."""
        self.remaining()
        return max(0.0, self._let_in[-1][0] + self.seconds - self.clock()) if self._let_in else 0.0


@dataclass
class OpenAISimulator:
    """The server: `async with OpenAISimulator(…) as simulator: simulator.url`.

    Attributes:
        requests_per_minute: refused beyond it.
        tokens_per_minute: refused beyond it.
        minute: seconds of the windows.
        latency: seconds that an answer takes.
        faults: share of requests for each fault, by `seed`.
        retry_after: what a 429 by fault says.
        poison: texts that contain the key have the fault whenever they are asked for.
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
    poison: dict[str, Fault] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    books: Books = field(default_factory=Books)
    port: int = 0
    url: str = ""
    _asked: deque[tuple[Fault, float | None]] = field(default_factory=deque)
    _in_flight: int = 0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._requests = Window(self.requests_per_minute, self.minute, self.clock)
        self._tokens = Window(self.tokens_per_minute, self.minute, self.clock)

    async def __aenter__(self) -> Self:
        """Serves on the loopback address; `url` is then what a client takes as its base URL."""
        self._runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._runner.cleanup()

    def misbehave(self, fault: str, *, times: int = 1, retry_after: float | None = None) -> None:
        """The next `times` requests have this fault."""
        self._asked.extend([(Fault(fault), retry_after)] * times)

    def behave(self) -> None:
        """Takes back what was asked for and is still to come, and all that comes by chance."""
        self._asked.clear()
        self.faults = {}

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/books", self._show_books)
        app.router.add_post("/misbehave", self._ask_to_misbehave)
        return app

    async def _show_books(self, request: web.Request) -> web.Response:
        del request
        return web.json_response(self.books.as_json())

    async def _ask_to_misbehave(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.misbehave(asked["fault"], times=asked.get("times", 1), retry_after=asked.get("retry_after"))
        return web.json_response({})

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        self.books.requests += 1
        self._in_flight += 1
        self.books.most_in_flight = max(self.books.most_in_flight, self._in_flight)
        try:
            return await self._answer(request)
        finally:
            self._in_flight -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return _refusal(401, "Incorrect API key provided.", code="invalid_api_key")
        refused = _check_model(body)
        if refused is not None:
            return refused
        inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
        counts = [count_tokens(text) for text in inputs]
        tokens = sum(counts)
        self.books.largest_inputs = max(self.books.largest_inputs, len(inputs))
        self.books.largest_tokens = max(self.books.largest_tokens, tokens)
        refused = _check_size(inputs, counts)
        if refused is not None:
            self.books.too_large += 1
            return refused
        fault, retry_after = self._next_fault(inputs)
        if fault is not None:
            self.books.faults[fault.value] += 1
        if fault in _UNPAID:
            return await self._unpaid(request, fault, retry_after)
        if self._requests.remaining() < 1 or self._tokens.remaining() < tokens:
            self.books.over_limit += 1
            kind = "requests" if self._requests.remaining() < 1 else "tokens"
            message = f"Rate limit reached for {body['model']} on {kind} per min. Please try again in 1s."
            return _refusal(429, message, kind=kind, code="rate_limit_exceeded", headers=self._headers())
        self._requests.take(1)
        self._tokens.take(tokens)
        if self.latency:
            await asyncio.sleep(self.latency)
        self.books.paid.update(inputs)
        self.books.tokens += tokens
        gone = request.transport is None or request.transport.is_closing()
        if gone or fault in _UNUSABLE:
            self.books.lost.update(inputs)
        if fault is Fault.NAN:
            self.books.lost.update(self._poisoned(inputs, Fault.NAN) or inputs[:1])
        if fault is Fault.DROPPED and request.transport is not None:
            request.transport.abort()
        self.books.answered += not gone and fault is not Fault.DROPPED
        return self._vectors(body, inputs, tokens, fault)

    def _next_fault(self, inputs: list[str]) -> tuple[Fault | None, float | None]:
        for marker, fault in self.poison.items():
            if any(marker in text for text in inputs):
                return fault, None
        if self._asked:
            return self._asked.popleft()
        draw = self._chance.random()
        for name, share in self.faults.items():
            if draw < share:
                return Fault(name), None
            draw -= share
        return None, None

    def _poisoned(self, inputs: list[str], fault: Fault) -> list[str]:
        markers = [marker for marker, poison in self.poison.items() if poison is fault]
        return [text for text in inputs if any(marker in text for marker in markers)]

    async def _unpaid(self, request: web.Request, fault: Fault | None, retry_after: float | None) -> web.Response:
        match fault:
            case Fault.HANG:
                while request.transport is not None and not request.transport.is_closing():
                    await asyncio.sleep(0.05)
                return web.Response()
            case Fault.RATE_LIMITED:
                wait = self.retry_after if retry_after is None else retry_after
                headers = {**self._headers(), "retry-after": f"{wait:g}"}
                message = f"Rate limit reached on tokens per min (TPM). Please try again in {wait:g}s."
                return _refusal(429, message, kind="tokens", code="rate_limit_exceeded", headers=headers)
            case Fault.QUOTA:
                message = "You exceeded your current quota, please check your plan and billing details."
                return _refusal(429, message, kind="insufficient_quota", code="insufficient_quota")
            case Fault.UNAUTHORISED:
                return _refusal(401, "Incorrect API key provided.", code="invalid_api_key")
            case Fault.REJECTED:
                return _refusal(400, "The input cannot be embedded.")
            case _:
                message = "The server had an error while processing your request. Sorry about that!"
                return _refusal(500, message, kind="server_error")

    def _vectors(self, body: dict[str, Any], inputs: list[str], tokens: int, fault: Fault | None) -> web.Response:
        dimensions = body.get("dimensions") or NATIVE_DIMENSIONS[body["model"]]
        vectors = [vector_of(text, dimensions) for text in inputs]
        if fault is Fault.NAN:
            poisoned = self._poisoned(inputs, Fault.NAN)
            for position in [inputs.index(text) for text in poisoned] or [0]:
                vectors[position] = vectors[position].copy()
                vectors[position][0] = np.nan
        if fault is Fault.WRONG_DIMENSIONS:
            vectors[0] = vectors[0][:-1]
        in_base64 = body.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode() if in_base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        if fault is Fault.SHUFFLED:
            data.reverse()
        elif fault is Fault.WRONG_INDEX:
            data[-1]["index"] = 0 if len(data) > 1 else 1
        elif fault is Fault.SHORT:
            data.pop()
        elif fault is Fault.EMPTY:
            data.clear()
        answer = {
            "object": "list",
            "data": data,
            "model": body["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        text = json.dumps(answer)
        if fault is Fault.TRUNCATED:
            text = text[: len(text) // 2]
        return web.Response(text=text, content_type="application/json", headers=self._headers())

    def _headers(self) -> dict[str, str]:
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


def count_tokens(text: str) -> int:
    """Tokens of a text, as this server counts them."""
    pieces = _TOKENS.findall(text)
    others = sum(len(piece.encode()) for piece in pieces if not piece.isascii())
    return sum(piece.isascii() for piece in pieces) + -(-others // 2) or 1


@lru_cache(maxsize=50_000)
def vector_of(text: str, dimensions: int) -> np.ndarray:
    """The vector of a text: of length 1, little-endian float32."""
    seed = int.from_bytes(sha256(text.encode()).digest(), "big")
    vector = np.random.default_rng(seed).standard_normal(dimensions)
    return (vector / np.linalg.norm(vector)).astype("<f4")


def _check_model(body: Mapping[str, Any]) -> web.Response | None:
    model = body.get("model")
    if model not in NATIVE_DIMENSIONS:
        message = f"The model `{model}` does not exist or you do not have access to it."
        return _refusal(404, message, code="model_not_found")
    dimensions = body.get("dimensions")
    if dimensions is not None and not str(model).startswith("text-embedding-3"):
        return _refusal(400, "This model does not support specifying dimensions.", param="dimensions")
    if dimensions is not None and not 1 <= dimensions <= NATIVE_DIMENSIONS[model]:
        return _refusal(400, f"Invalid value for 'dimensions' = {dimensions}.", param="dimensions")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        return _refusal(400, "Invalid 'encoding_format'.", param="encoding_format")
    return None


def _check_size(inputs: Any, counts: list[int]) -> web.Response | None:
    if not 1 <= len(inputs) <= MAX_INPUTS or any(not isinstance(text, str) or not text for text in inputs):
        message = (
            "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
        )
        return _refusal(400, message)
    longest = max(counts)
    if longest > MAX_INPUT_TOKENS:
        message = (
            f"This model's maximum context length is {MAX_INPUT_TOKENS} tokens, however you requested {longest} tokens "
            f"({longest} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
        )
        return _refusal(400, message)
    asked = max(sum(counts), sum(len(text.encode()) for text in inputs) // 4)
    if asked > MAX_REQUEST_TOKENS:
        message = f"Requested {asked} tokens, max {MAX_REQUEST_TOKENS} tokens per request"
        return _refusal(400, message, kind="max_tokens_per_request", code="max_tokens_per_request")
    return None


def _refusal(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return web.json_response(body, status=status, headers={"x-request-id": f"req_{uuid4().hex}", **(headers or {})})


def _go_duration(seconds: float) -> str:
    """As Go writes it: `0s`, `12ms`, `1.5s`, `6m0s`."""
    if seconds >= 60:
        return f"{int(seconds // 60)}m{seconds % 60:.3g}s"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.4g}s"
    return f"{max(1, round(seconds * 1000))}ms"


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--requests-per-minute", type=int, default=3000)
    parser.add_argument("--tokens-per-minute", type=int, default=1_000_000)
    parser.add_argument("--faults", type=json.loads, default={}, help='as {"rate_limited": 0.1, "dropped": 0.02}')
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())

    async def serve() -> None:
        async with OpenAISimulator(**options) as simulator:
            print(simulator.url, flush=True)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
