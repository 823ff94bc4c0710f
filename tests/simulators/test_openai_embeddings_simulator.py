"""The simulator as the official client sees it: limits, error bodies, both encodings, rate limits, faults, books."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.simulators.openai_embeddings import KEY, OpenAISimulator, count_tokens, vector_of
from tests.simulators.swift_embeddings import SwiftEmbeddings

MODEL = "text-embedding-3-small"


@pytest.fixture
async def simulator() -> AsyncIterator[OpenAISimulator]:
    async with OpenAISimulator() as simulator:
        yield simulator


@pytest.fixture
async def client(simulator: OpenAISimulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0, timeout=5.0) as client:
        yield client


async def test_the_same_text_has_the_same_vector_in_both_encodings_and_in_any_company(
    simulator: OpenAISimulator, client: openai.AsyncOpenAI
) -> None:
    floats = await client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    packed = await client.embeddings.create(model=MODEL, input="two", encoding_format="base64")
    decoded = np.frombuffer(b64decode(str(packed.data[0].embedding)), "<f4")
    assert decoded.shape == (1536,)
    np.testing.assert_allclose(floats.data[1].embedding, decoded, rtol=1e-6)
    assert np.linalg.norm(decoded) == pytest.approx(1.0, abs=1e-5)
    assert packed.usage.prompt_tokens == 1
    assert simulator.books.paid == {"one": 1, "two": 2}
    assert simulator.books.paid_again() == {"two": 1}


async def test_dimensions_are_those_asked_for(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model=MODEL, input=["one"], dimensions=256)
    np.testing.assert_allclose(answer.data[0].embedding, vector_of("one", 256), rtol=1e-6)
    with pytest.raises(openai.BadRequestError):
        await client.embeddings.create(model="text-embedding-ada-002", input=["one"], dimensions=256)


@pytest.mark.parametrize(
    ("texts", "message", "code"),
    [
        (["x"] * 2049, "'$.input' is invalid", None),
        ([""], "'$.input' is invalid", None),
        (["a " * 8193], "maximum context length is 8192 tokens", None),
        (["a " * 8000] * 38, "max 300000 tokens per request", "max_tokens_per_request"),
        (["Zauberlehrling" * 572] * 160, "max 300000 tokens per request", "max_tokens_per_request"),
    ],
)
async def test_what_is_too_large_is_refused_in_the_real_words_and_not_paid(
    simulator: OpenAISimulator, client: openai.AsyncOpenAI, texts: list[str], message: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(model=MODEL, input=texts)
    assert message in str(caught.value)
    assert caught.value.code == code
    assert simulator.books.paid == {}
    assert simulator.books.too_large == 1


async def test_the_largest_allowed_is_taken(client: openai.AsyncOpenAI) -> None:
    assert len((await client.embeddings.create(model=MODEL, input=["x"] * 2048, dimensions=8)).data) == 2048
    assert count_tokens("a " * 8192) == 8192
    await client.embeddings.create(model=MODEL, input=["a " * 8192])


async def test_keys_and_models_that_are_not_there_are_refused(simulator: OpenAISimulator) -> None:
    async with openai.AsyncOpenAI(api_key="sk-other", base_url=simulator.url, max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            await stranger.embeddings.create(model=MODEL, input=["x"])
        assert caught.value.code == "invalid_api_key"
    async with openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.embeddings.create(model="text-embedding-9", input=["x"])
        assert missing.value.code == "model_not_found"


async def test_minutes_are_full_by_requests_and_by_tokens_and_slide() -> None:
    now = 0.0
    async with (
        OpenAISimulator(requests_per_minute=3, tokens_per_minute=10, clock=lambda: now) as simulator,
        openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0) as client,
    ):
        first = await client.embeddings.with_raw_response.create(model=MODEL, input=["a b c d e f"])
        assert first.headers["x-ratelimit-limit-tokens"] == "10"
        assert first.headers["x-ratelimit-remaining-tokens"] == "4"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-reset-tokens"] == "1m0s"
        with pytest.raises(openai.RateLimitError) as caught:
            await client.embeddings.create(model=MODEL, input=["a b c d e"])
        assert caught.value.code == "rate_limit_exceeded"
        now = 30.0
        await client.embeddings.create(model=MODEL, input=["a"])
        await client.embeddings.create(model=MODEL, input=["b"])
        with pytest.raises(openai.RateLimitError):
            await client.embeddings.create(model=MODEL, input=["c"])
        now = 60.0
        await client.embeddings.create(model=MODEL, input=["a b c d e f"])
    assert simulator.books.over_limit == 2


@pytest.mark.parametrize("counts_failed", [False, True])
async def test_requests_that_fail_may_have_their_place_in_the_minute_or_not(counts_failed: bool) -> None:
    async with (
        OpenAISimulator(requests_per_minute=3, counts_failed=counts_failed) as simulator,
        openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0) as client,
    ):
        for fault in ("server_error", "rate_limited"):
            simulator.misbehave(fault)
            with pytest.raises(openai.APIStatusError):
                await client.embeddings.create(model=MODEL, input=["a"])
        answered = 1 if counts_failed else 3
        for _ in range(answered):
            await client.embeddings.create(model=MODEL, input=["a"])
        with pytest.raises(openai.RateLimitError):
            await client.embeddings.create(model=MODEL, input=["a"])
    assert simulator.books.answered == answered
    assert simulator.books.over_limit == 1
    assert simulator.busiest_minute == 3


async def test_a_request_larger_than_a_minute_is_told_by_its_message_alone() -> None:
    async with (
        OpenAISimulator(tokens_per_minute=10, tells_too_large=True) as simulator,
        openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0) as client,
    ):
        for asked, words in (("a " * 11, "Request too large"), ("a " * 6, ""), ("a " * 6, "Rate limit reached")):
            if not words:
                await client.embeddings.create(model=MODEL, input=[asked])
                continue
            with pytest.raises(openai.RateLimitError, match=words) as caught:
                await client.embeddings.create(model=MODEL, input=[asked])
            assert (caught.value.type, caught.value.code) == ("tokens", "rate_limit_exceeded")
            assert ("x-ratelimit-limit-tokens" in caught.value.response.headers) == (words == "Rate limit reached")


async def test_each_fault_arrives_as_the_client_knows_it(
    simulator: OpenAISimulator, client: openai.AsyncOpenAI
) -> None:
    async def ask() -> openai.types.CreateEmbeddingResponse:
        return await client.embeddings.create(model=MODEL, input=["a", "b"], dimensions=4, encoding_format="float")

    simulator.misbehave("rate_limited", retry_after=300)
    with pytest.raises(openai.RateLimitError) as limited:
        await ask()
    assert limited.value.response.headers["retry-after"] == "300"
    simulator.misbehave("quota")
    with pytest.raises(openai.RateLimitError) as quota:
        await ask()
    assert quota.value.code == "insufficient_quota"
    simulator.misbehave("server_error")
    with pytest.raises(openai.InternalServerError):
        await ask()
    simulator.misbehave("unauthorised")
    with pytest.raises(openai.AuthenticationError):
        await ask()
    simulator.misbehave("rejected")
    with pytest.raises(openai.BadRequestError):
        await ask()
    simulator.misbehave("hang")
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.2).embeddings.create(model=MODEL, input=["a"])
    assert simulator.books.paid == {}

    simulator.misbehave("stalled")
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.2).embeddings.create(model=MODEL, input=["s"])
    assert simulator.books.paid == simulator.books.lost == {"s": 1}
    assert simulator.books.answered == 0

    simulator.misbehave("dropped")
    with pytest.raises(openai.APIConnectionError):
        await ask()
    simulator.misbehave("truncated")
    with pytest.raises((openai.APIError, ValueError)):
        await ask()
    assert simulator.books.paid == simulator.books.lost == {"s": 1, "a": 2, "b": 2}

    simulator.misbehave("shuffled")
    assert [row.index for row in (await ask()).data] == [1, 0]
    simulator.misbehave("wrong_index")
    assert [row.index for row in (await ask()).data] == [0, 0]
    simulator.misbehave("short")
    assert len((await ask()).data) == 1
    simulator.misbehave("nan")
    answer = await ask()
    assert np.isnan(answer.data[0].embedding).tolist() == [True, False, False, False]
    simulator.misbehave("wrong_dimensions")
    assert [len(row.embedding) for row in (await ask()).data] == [3, 4]
    simulator.misbehave("empty")
    with pytest.raises(ValueError, match="No embedding data"):
        await client.embeddings.create(model=MODEL, input=["a"])


async def test_a_text_can_be_poison_and_chance_is_the_same_for_the_same_seed() -> None:
    async def run(seed: int) -> list[str]:
        outcomes = []
        async with (
            OpenAISimulator(faults={"server_error": 0.3, "rejected": 0.2}, seed=seed) as simulator,
            openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0) as client,
        ):
            for _ in range(20):
                try:
                    await client.embeddings.create(model=MODEL, input=["a"], dimensions=4)
                    outcomes.append("ok")
                except openai.APIStatusError as error:
                    outcomes.append(str(error.status_code))
            simulator.behave()
            simulator.poison["venom"] = "rejected"  # type: ignore[assignment]
            await client.embeddings.create(model=MODEL, input=["a"], dimensions=4)
        return outcomes

    first, again, other = await run(7), await run(7), await run(8)
    assert first == again != other
    assert {"ok", "500", "400"} == set(first)


async def test_an_answer_whose_client_is_gone_counts_as_lost() -> None:
    async with OpenAISimulator(latency=0.3) as simulator:
        async with openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0, timeout=0.1) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.embeddings.create(model=MODEL, input=["a"])
        async with asyncio.timeout(5):
            while not simulator.books.paid:
                await asyncio.sleep(0.01)
        assert simulator.books.paid == simulator.books.lost == {"a": 1}


def test_it_runs_by_name_and_shows_its_books_over_http() -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.simulators.openai_embeddings"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with openai.OpenAI(api_key=KEY, base_url=url, max_retries=0) as client:
            server = url.removesuffix("/v1")
            httpx.post(f"{server}/misbehave", json={"fault": "server_error"})
            with pytest.raises(openai.InternalServerError):
                client.embeddings.create(model=MODEL, input=["a"])
            client.embeddings.create(model=MODEL, input=["a"])
            books = httpx.get(f"{server}/books").json()
        assert books["answered"] == 1
        assert list(books["paid"].values()) == [1]
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.parametrize("encoding", ["base64", "float"])
async def test_the_swift_one_answers_the_official_client_and_keeps_the_same_books(encoding: Any) -> None:
    async with (
        SwiftEmbeddings() as simulator,
        openai.AsyncOpenAI(api_key=KEY, base_url=simulator.url, max_retries=0, timeout=5.0) as client,
    ):
        answer = await client.embeddings.create(model=MODEL, input=["one", "two", "one"], encoding_format=encoding)
        given = [row.embedding for row in answer.data]
        assert given[0] == given[2]
        vector = np.frombuffer(b64decode(str(given[1])), "<f4") if encoding == "base64" else np.array(given[1])
        assert vector.shape == (1536,)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
        assert simulator.books.paid == {"one": 2, "two": 1}
        simulator.misbehave("short")
        assert len((await client.embeddings.create(model=MODEL, input=["one", "two"])).data) == 1
