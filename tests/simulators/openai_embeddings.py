"""A server that speaks OpenAI's `POST /v1/embeddings`: its limits, its error bodies, its rate limits, and its bad days.

    python -m tests.simulators.openai_embeddings --port 8100 --latency 0.05 --faults '{"rate_limited": 0.1}' --seed 7

The vector of a text is a function of the text alone. The books tell which texts were paid for, how often, and whose
answers never arrived; over HTTP they are at `GET /books`, and faults are asked for by `POST /misbehave`.

Tokens are counted roughly as cl100k does: a piece of up to six letters, of up to three digits, each other sign, and
two bytes of any other script are a token. The limit of a request is held against the larger of that and a quarter of
its bytes, since the real server guesses by bytes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
from aiohttp import web

from tests.simulators.openai_server import KEY, UNPAID, OpenAIServer, Traffic, refusal, serve_by_name, until_gone

__all__ = ["KEY", "Fault", "OpenAISimulator", "count_tokens", "vector_of"]

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 8192
MAX_REQUEST_TOKENS = 300_000
NATIVE_DIMENSIONS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}
_TOKENS = re.compile(r"[A-Za-z]{1,6}|[0-9]{1,3}|[!-~]|[^\x00-\x7f]")


class Fault(StrEnum):
    """How an answer can go wrong. What is done before it is paid for is marked so; the others are after."""

    RATE_LIMITED = "rate_limited"  # before: 429 and Retry-After
    QUOTA = "quota"  # before: 429 insufficient_quota
    SERVER_ERROR = "server_error"  # before: 500
    UNAUTHORISED = "unauthorised"  # before: 401
    HANG = "hang"  # before: no answer, ever
    REJECTED = "rejected"  # before: 400 that names no size
    STALLED = "stalled"  # no answer, ever
    DROPPED = "dropped"  # the connection is closed without an answer
    TRUNCATED = "truncated"  # half of the JSON
    SHUFFLED = "shuffled"  # each vector with its own index, in another order: allowed
    WRONG_INDEX = "wrong_index"  # one index twice, another never
    SHORT = "short"  # the last vector is missing
    NAN = "nan"  # a component that is no number
    WRONG_DIMENSIONS = "wrong_dimensions"  # one component less
    EMPTY = "empty"  # 200 and no vector at all


_UNUSABLE = {
    Fault.STALLED,
    Fault.DROPPED,
    Fault.TRUNCATED,
    Fault.WRONG_INDEX,
    Fault.SHORT,
    Fault.WRONG_DIMENSIONS,
    Fault.EMPTY,
}


@dataclass
class Books(Traffic):
    """What was done and paid for.

    Attributes:
        paid: how often each text was paid for.
        lost: how often it was paid for and its vector never arrived, or not as one: the simulator's own doing, or
            the client was gone when the answer was ready.
        too_large: requests refused for their size.
        largest_inputs: most texts of one request.
        largest_tokens: most tokens of one request.
    """

    paid: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    largest_inputs: int = 0
    largest_tokens: int = 0

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
class OpenAISimulator(OpenAIServer):
    """The server: `async with OpenAISimulator(…) as simulator: simulator.url`.

    Attributes:
        poison: texts that contain the key have the fault whenever they are asked for.
        books: what was done and paid for.
    """

    poison: dict[str, Fault] = field(default_factory=dict)
    books: Books = field(default_factory=Books)

    known_faults = tuple(Fault)
    path = "/v1/embeddings"

    @property
    def traffic(self) -> Books:
        """The books."""
        return self.books

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Vectors, or what is wrong."""
        refused = _check_model(body)
        if refused is not None:
            return refused
        inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
        counts = [self.count(text) for text in inputs]
        tokens = sum(counts)
        self.books.largest_inputs = max(self.books.largest_inputs, len(inputs))
        self.books.largest_tokens = max(self.books.largest_tokens, tokens)
        refused = _check_size(inputs, counts)
        if refused is not None:
            self.books.too_large += 1
            return refused
        fault, retry_after = self._fault_of(inputs)
        full = self.full(body["model"], tokens, fault)
        if full is not None:
            return full
        if fault is not None:
            self.books.faults[fault] += 1
        if fault in UNPAID:
            return await self.unpaid(request, fault, retry_after)
        if self.latency:
            await asyncio.sleep(self.latency)
        gone = request.transport is None or request.transport.is_closing()
        lost = inputs if gone or fault in _UNUSABLE else []
        if fault == Fault.NAN and not gone:
            lost = self._poisoned(inputs, Fault.NAN) or inputs[:1]
        self.pay(request, inputs, tokens, lost)
        if fault == Fault.STALLED:
            await until_gone(request)
            return web.Response()
        if fault == Fault.DROPPED and request.transport is not None:
            request.transport.abort()
        self.books.answered += not gone and fault != Fault.DROPPED
        return self.vectors(body, inputs, tokens, fault)

    def pay(self, request: web.Request, inputs: list[str], tokens: int, lost: list[str]) -> None:
        """Writes down what was paid for, and what of it nobody gets."""
        del request
        self.books.paid.update(inputs)
        self.books.tokens += tokens
        self.books.lost.update(lost)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return count_tokens(text)

    def _fault_of(self, inputs: list[str]) -> tuple[str | None, float | None]:
        for marker, fault in self.poison.items():
            if any(marker in text for text in inputs):
                return str(fault), None
        return self.next_fault()

    def _poisoned(self, inputs: list[str], fault: Fault) -> list[str]:
        markers = [marker for marker, poison in self.poison.items() if poison is fault]
        return [text for text in inputs if any(marker in text for marker in markers)]

    def vectors(self, body: dict[str, Any], inputs: list[str], tokens: int, fault: str | None) -> web.Response:
        """The answer to what was paid for, or what the fault makes of it."""
        dimensions = body.get("dimensions") or NATIVE_DIMENSIONS[body["model"]]
        vectors = [vector_of(text, dimensions) for text in inputs]
        if fault == Fault.NAN:
            poisoned = self._poisoned(inputs, Fault.NAN)
            for position in [inputs.index(text) for text in poisoned] or [0]:
                vectors[position] = vectors[position].copy()
                vectors[position][0] = np.nan
        if fault == Fault.WRONG_DIMENSIONS:
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
        if fault == Fault.SHUFFLED:
            data.reverse()
        elif fault == Fault.WRONG_INDEX:
            data[-1]["index"] = 0 if len(data) > 1 else 1
        elif fault == Fault.SHORT:
            data.pop()
        elif fault == Fault.EMPTY:
            data.clear()
        answer = {
            "object": "list",
            "data": data,
            "model": body["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        text = json.dumps(answer)
        if fault == Fault.TRUNCATED:
            text = text[: len(text) // 2]
        return web.Response(text=text, content_type="application/json", headers=self.headers())


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
        return refusal(404, message, code="model_not_found")
    dimensions = body.get("dimensions")
    if dimensions is not None and not str(model).startswith("text-embedding-3"):
        return refusal(400, "This model does not support specifying dimensions.", param="dimensions")
    if dimensions is not None and not 1 <= dimensions <= NATIVE_DIMENSIONS[model]:
        return refusal(400, f"Invalid value for 'dimensions' = {dimensions}.", param="dimensions")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        return refusal(400, "Invalid 'encoding_format'.", param="encoding_format")
    return None


def _check_size(inputs: Any, counts: list[int]) -> web.Response | None:
    if not 1 <= len(inputs) <= MAX_INPUTS or any(not isinstance(text, str) or not text for text in inputs):
        message = (
            "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
        )
        return refusal(400, message)
    longest = max(counts)
    if longest > MAX_INPUT_TOKENS:
        message = (
            f"This model's maximum context length is {MAX_INPUT_TOKENS} tokens, however you requested {longest} tokens "
            f"({longest} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
        )
        return refusal(400, message)
    asked = max(sum(counts), sum(len(text.encode()) for text in inputs) // 4)
    if asked > MAX_REQUEST_TOKENS:
        message = f"Requested {asked} tokens, max {MAX_REQUEST_TOKENS} tokens per request"
        return refusal(400, message, kind="max_tokens_per_request", code="max_tokens_per_request")
    return None


def main() -> None:
    """Serves until it is interrupted."""
    serve_by_name(OpenAISimulator, __doc__)


if __name__ == "__main__":
    main()
