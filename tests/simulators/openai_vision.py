"""A server that speaks OpenAI's `POST /v1/chat/completions` with one picture and a strict JSON schema; its bad days.

    python -m tests.simulators.openai_vision --port 8101 --latency 0.5 --faults '{"refusal": 0.1}' --seed 7

What it finds is a function of the picture and the detection types: one thing of each type. The books tell which
pictures were paid for, how often, and whose answers never arrived. Pictures count as patches of 32 x 32 pixels, as for
gpt-4.1-mini, were each 512 x 512.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any
from uuid import uuid4

from aiohttp import web

from tests.simulators.openai_server import KEY, UNPAID, OpenAIServer, Traffic, refusal, serve_by_name

__all__ = ["IMAGE_TOKENS", "KEY", "Fault", "VisionSimulator", "findings_of"]

MODELS = ("gpt-4.1-mini", "gpt-4.1", "gpt-4o-mini")
IMAGE_TOKENS = 415
"""256 patches x 1.62."""
MAX_IMAGE_BYTES = 20 * 1024 * 1024
_KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png"}
_ALLOWED_KEYWORDS = {"type", "properties", "required", "additionalProperties", "items", "enum", "description"}


class Fault(StrEnum):
    """How an answer can go wrong; the first six before it is paid for."""

    RATE_LIMITED = "rate_limited"
    QUOTA = "quota"
    SERVER_ERROR = "server_error"
    UNAUTHORISED = "unauthorised"
    HANG = "hang"
    REJECTED = "rejected"
    DROPPED = "dropped"  # the connection is closed without an answer
    TRUNCATED = "truncated"  # half of the HTTP body
    REFUSAL = "refusal"  # the model refuses
    CONTENT_FILTER = "content_filter"  # a filter stops the answer
    LENGTH = "length"  # the answer is cut off at its limit
    NOT_JSON = "not_json"  # prose
    NESTED = "nested"  # brackets without end
    OUTSIDE = "outside"  # a corner beyond the edge
    NAN = "nan"  # a confidence that is no number
    OTHER_TYPE = "other_type"  # a type that nobody asked for
    EXTRA_FIELD = "extra_field"  # a field that the schema forbids
    NO_CHOICE = "no_choice"  # 200 and no answer in it
    NO_USAGE = "no_usage"  # a good answer that tells no tokens: allowed


@dataclass
class Books(Traffic):
    """What was done and paid for, pictures by their SHA-256.

    Attributes:
        paid: how often each picture was paid for.
        lost: how often it was paid for and its client was gone, or the answer never sent.
        largest_image: bytes of the largest picture.
        asked: the detection types of each request that was paid for.
    """

    paid: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    largest_image: int = 0
    asked: list[list[str]] = field(default_factory=list)


@dataclass
class VisionSimulator(OpenAIServer):
    """The server: `async with VisionSimulator(…) as simulator: simulator.url`.

    Attributes:
        poison: the fault of each request with this picture, by its SHA-256.
        books: what was done and paid for.
    """

    poison: dict[str, Fault] = field(default_factory=dict)
    books: Books = field(default_factory=Books)

    known_faults = tuple(Fault)
    path = "/v1/chat/completions"

    @property
    def traffic(self) -> Books:
        """The books."""
        return self.books

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """What is in the picture, or what is wrong."""
        if body.get("model") not in MODELS:
            message = f"The model `{body.get('model')}` does not exist or you do not have access to it."
            return refusal(404, message, code="model_not_found")
        try:
            image = _image_of(body)
            types = _types_of(body)
        except (LookupError, TypeError, ValueError, binascii.Error) as error:
            return refusal(400, f"Invalid request: {error!r}", param=getattr(error, "param", None))
        picture = sha256(image).hexdigest()
        self.books.largest_image = max(self.books.largest_image, len(image))
        fault, retry_after = (self.poison[picture], None) if picture in self.poison else self.next_fault()
        content = json.dumps({"detections": findings_of(image, types)})
        usage = _usage(body, content)
        full = self.full(body["model"], usage["prompt_tokens"] + body["max_completion_tokens"], fault)
        if full is not None:
            return full
        if fault is not None:
            self.books.faults[str(fault)] += 1
        if fault in UNPAID:
            return await self.unpaid(request, fault, retry_after)
        if self.latency:
            await asyncio.sleep(self.latency)
        self.books.paid[picture] += 1
        self.books.asked.append(types)
        self.books.tokens += usage["total_tokens"]
        gone = request.transport is None or request.transport.is_closing()
        if gone or fault == Fault.DROPPED:
            self.books.lost[picture] += 1
        if fault == Fault.DROPPED and request.transport is not None:
            request.transport.abort()
        self.books.answered += not gone and fault != Fault.DROPPED
        text = json.dumps(_completion(body, content, usage, fault))
        if fault == Fault.TRUNCATED:
            text = text[: len(text) // 2]
        return web.Response(text=text, content_type="application/json", headers=self.headers())


def findings_of(image: bytes, types: Sequence[str]) -> list[dict[str, Any]]:
    """What the model finds in a picture."""
    found = []
    for kind in types:
        draw = sha256(kind.encode() + image).digest()
        left, top = draw[0] / 512, draw[1] / 512
        found.append(
            {
                "type": kind,
                "label": f"{kind} {draw[2]}",
                "confidence": round(draw[3] / 255, 3),
                "box": None if draw[4] < 64 else {"left": left, "top": top, "right": left + 0.4, "bottom": top + 0.3},
                "note": f"Seen in {len(image)} bytes.",
            }
        )
    return found


def _completion(body: dict[str, Any], content: str, usage: dict[str, Any], fault: str | None) -> dict[str, Any]:
    finish, refused = "stop", None
    told = json.loads(content)
    match fault:
        case Fault.REFUSAL:
            content, refused = "", "I cannot help with this picture."
        case Fault.CONTENT_FILTER:
            content, finish = "", "content_filter"
        case Fault.LENGTH:
            content, finish = content[: len(content) // 2], "length"
        case Fault.NOT_JSON:
            content = "I see a wall with some water on it."
        case Fault.NESTED:
            content = "[" * 100_000
        case Fault.OUTSIDE:
            told["detections"][0]["box"] = {"left": 0.5, "top": 0.1, "right": 1.5, "bottom": 0.4}
            content = json.dumps(told)
        case Fault.NAN:
            told["detections"][0]["confidence"] = float("nan")
            content = json.dumps(told)
        case Fault.OTHER_TYPE:
            told["detections"][0]["type"] = "weather"
            content = json.dumps(told)
        case Fault.EXTRA_FIELD:
            told["detections"][0]["severity"] = 3
            content = json.dumps(told)
    message = {"role": "assistant", "content": None if refused else content, "refusal": refused, "annotations": []}
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": 1_795_000_000,
        "model": body["model"],
        "choices": []
        if fault == Fault.NO_CHOICE
        else [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": None if fault == Fault.NO_USAGE else usage,
        "service_tier": "default",
    }


def _usage(body: dict[str, Any], content: str) -> dict[str, Any]:
    words = sum(len(text) for text in _texts(body["messages"])) + len(json.dumps(body["response_format"]))
    prompt, completion = IMAGE_TOKENS + words // 4, len(content) // 4
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    parts = [
        [message["content"]] if isinstance(message["content"], str) else message["content"] for message in messages
    ]
    return [part if isinstance(part, str) else part.get("text", "") for found in parts for part in found]


def _image_of(body: dict[str, Any]) -> bytes:
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    (image,) = (part["image_url"] for part in parts if part["type"] == "image_url")
    if image.get("detail", "auto") not in ("low", "high", "auto", "original"):
        raise ValueError("detail")
    head, _, data = image["url"].partition(",")
    content = base64.b64decode(data, validate=True)
    kind = next((name for magic, name in _KINDS.items() if content.startswith(magic)), "none")
    if head != f"data:{kind};base64" or len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"the picture is {kind}, announced as {head[:40]!r}")
    return content


def _types_of(body: dict[str, Any]) -> list[str]:
    """The detection types that the schema names, once it is one that strict answers can keep to."""
    asked = body["response_format"]
    if asked["type"] != "json_schema" or asked["json_schema"]["strict"] is not True or not asked["json_schema"]["name"]:
        raise ValueError("response_format")
    if not isinstance(body["max_completion_tokens"], int):
        raise TypeError("max_completion_tokens")
    schema = asked["json_schema"]["schema"]
    _check_strict(schema)
    types: list[str] = schema["properties"]["detections"]["items"]["properties"]["type"]["enum"]
    return types


def _check_strict(schema: dict[str, Any]) -> None:
    if set(schema) - _ALLOWED_KEYWORDS:
        raise ValueError(f"not permitted in a strict schema: {set(schema) - _ALLOWED_KEYWORDS}")
    if "properties" in schema:
        if schema.get("additionalProperties") is not False or set(schema["required"]) != set(schema["properties"]):
            raise ValueError("an object must require all of its properties and allow no others")
        for inner in schema["properties"].values():
            _check_strict(inner)
    if "items" in schema:
        _check_strict(schema["items"])


def main() -> None:
    """Serves until it is interrupted."""
    serve_by_name(VisionSimulator, __doc__)


if __name__ == "__main__":
    main()
