"""The vision simulator as the official client sees it: what it takes, what it finds, each fault, its books."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.simulators.openai_vision import IMAGE_TOKENS, KEY, Fault, VisionSimulator, findings_of

IMAGE = b"\xff\xd8\xff\xe0 a photo of a roof"
TYPES = ["damage", "material"]


def schema(**changes: Any) -> dict[str, Any]:
    """A small strict schema with the place where the types stand."""
    detection = {
        "type": "object",
        "properties": {"type": {"type": "string", "enum": TYPES}, "label": {"type": "string"}},
        "required": ["type", "label"],
        "additionalProperties": False,
        **changes,
    }
    return {
        "type": "object",
        "properties": {"detections": {"type": "array", "items": detection}},
        "required": ["detections"],
        "additionalProperties": False,
    }


async def ask(client: openai.AsyncOpenAI, image: bytes = IMAGE, **changes: Any) -> Any:
    kind = changes.pop("kind", "image/jpeg")
    url = f"data:{kind};base64,{base64.b64encode(image).decode()}"
    asked: dict[str, Any] = {
        "model": "gpt-4.1-mini",
        "messages": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}]},
        ],
        "max_completion_tokens": 500,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "detections", "strict": True, "schema": changes.pop("schema", schema())},
        },
    }
    return await client.chat.completions.create(**{**asked, **changes})


@pytest.fixture
async def simulator() -> AsyncIterator[VisionSimulator]:
    async with VisionSimulator() as simulator:
        yield simulator


@pytest.fixture
async def client(simulator: VisionSimulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0, timeout=5.0) as client:
        yield client


async def test_the_same_picture_is_found_to_show_the_same(
    simulator: VisionSimulator, client: openai.AsyncOpenAI
) -> None:
    first, again = await ask(client), await ask(client)
    (choice,) = first.choices
    assert (choice.finish_reason, choice.message.refusal) == ("stop", None)
    assert json.loads(choice.message.content)["detections"] == findings_of(IMAGE, TYPES)
    assert choice.message.content == again.choices[0].message.content
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens > IMAGE_TOKENS
    assert simulator.books.paid == {sha256(IMAGE).hexdigest(): 2}
    assert simulator.books.tokens == 2 * first.usage.total_tokens
    assert simulator.books.asked == [TYPES, TYPES]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "image/png"},
        {"image": b"GIF89a"},
        {"messages": [{"role": "user", "content": "no picture"}]},
        {"schema": schema(additionalProperties=True)},
        {"schema": schema(required=["type"])},
        {"schema": schema(minItems=1)},
        {"max_completion_tokens": None},
    ],
)
async def test_what_the_real_server_would_not_take_is_refused_and_not_paid(
    simulator: VisionSimulator, client: openai.AsyncOpenAI, changes: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError):
        await ask(client, **changes)
    assert not simulator.books.paid


async def test_each_fault_arrives_as_the_client_knows_it(
    simulator: VisionSimulator, client: openai.AsyncOpenAI
) -> None:
    for fault, expected in (
        (Fault.RATE_LIMITED, openai.RateLimitError),
        (Fault.QUOTA, openai.RateLimitError),
        (Fault.SERVER_ERROR, openai.InternalServerError),
        (Fault.UNAUTHORISED, openai.AuthenticationError),
        (Fault.REJECTED, openai.BadRequestError),
    ):
        simulator.misbehave(fault)
        with pytest.raises(expected):
            await ask(client)
    assert not simulator.books.paid
    simulator.misbehave(Fault.DROPPED)
    with pytest.raises(openai.APIConnectionError):
        await ask(client)
    assert simulator.books.paid == simulator.books.lost
    simulator.misbehave(Fault.REFUSAL)
    refused = (await ask(client)).choices[0].message
    assert refused.content is None
    assert refused.refusal
    for fault, reason in ((Fault.CONTENT_FILTER, "content_filter"), (Fault.LENGTH, "length")):
        simulator.misbehave(fault)
        assert (await ask(client)).choices[0].finish_reason == reason
    simulator.misbehave(Fault.NO_CHOICE)
    assert (await ask(client)).choices == []
    simulator.misbehave(Fault.NO_USAGE)
    assert (await ask(client)).usage is None
    with pytest.raises(ValueError, match="no fault"):
        simulator.misbehave("nonsense")


async def test_an_unknown_model_and_key_are_refused(simulator: VisionSimulator, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await ask(client, model="gpt-99")
    async with openai.AsyncOpenAI(api_key="sk-other", base_url=simulator.url, max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError):
            await ask(other)


async def test_a_minute_counts_what_an_answer_may_become() -> None:
    now = 0.0
    async with (
        VisionSimulator(tokens_per_minute=1500, clock=lambda: now) as simulator,
        openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0) as client,
    ):
        await ask(client)
        with pytest.raises(openai.RateLimitError):
            await ask(client)
        assert simulator.books.over_limit == 1
        now = 60.0
        await ask(client)


def test_it_runs_by_name() -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.simulators.openai_vision"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
