"""The OpenAI embedder against the simulator: what it gives, and each fault by itself."""

from __future__ import annotations

import base64
import importlib.machinery
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from tests.simulators.openai_embeddings import KEY, Fault, OpenAISimulator, vector_of
from tests.simulators.openai_server import refusal
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.embedding import EmbeddingModel, open_embedder
from upload_pipeline.providers.openai_embedder import EmbeddingError, OpenAIEmbedder
from upload_pipeline.providers.provider_failures import Remedy
from upload_pipeline.settings import Settings

TEXTS = ["water damage", "hail", "roof"]


@pytest.fixture
async def simulator() -> AsyncIterator[OpenAISimulator]:
    async with OpenAISimulator() as simulator:
        yield simulator


@pytest.fixture
async def embedder(simulator: OpenAISimulator) -> AsyncIterator[OpenAIEmbedder]:
    embedder = OpenAIEmbedder(
        api_key=KEY, base_url=simulator.url, model="text-embedding-3-small", dimensions=16, timeout=5.0
    )
    yield embedder
    await embedder.close()


def expected(texts: list[str], dimensions: int = 16) -> np.ndarray:
    return np.stack([vector_of(text, dimensions) for text in texts])


def setting(**values: Any) -> Settings:
    return Settings(**{"embedder": "openai", "openai_api_key": KEY, **values}, _env_file=None)


# opening


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({}, EmbeddingModel("text-embedding-3-small", "openai", 1536)),
        ({"openai_dimensions": 1536}, EmbeddingModel("text-embedding-3-small", "openai", 1536)),
        ({"openai_dimensions": 512}, EmbeddingModel("text-embedding-3-small@512", "openai", 512)),
        ({"openai_model": "text-embedding-3-large"}, EmbeddingModel("text-embedding-3-large", "openai", 3072)),
        ({"openai_model": "bge-m3", "openai_dimensions": 1024}, EmbeddingModel("bge-m3", "openai", 1024)),
    ],
)
async def test_it_is_opened_by_its_settings(values: dict[str, Any], facts: EmbeddingModel) -> None:
    embedder = open_embedder("openai", setting(**values))
    assert (embedder.facts, embedder.model, embedder.dimensions) == (facts, facts.name, facts.dimensions)
    await embedder.close()
    await embedder.close()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"openai_api_key": ""}, "UPLOAD_PIPELINE_OPENAI_API_KEY"),
        ({"openai_api_key": "sk-a sk-b"}, "UPLOAD_PIPELINE_OPENAI_API_KEY"),
        ({"openai_api_key": "sk-a\nsk-b"}, "UPLOAD_PIPELINE_OPENAI_API_KEY"),
        ({"openai_model": "bge-m3"}, "UPLOAD_PIPELINE_OPENAI_DIMENSIONS"),
        ({"openai_model": "text-embedding-ada-002", "openai_dimensions": 512}, "UPLOAD_PIPELINE_OPENAI_DIMENSIONS"),
        ({"openai_dimensions": 2000}, "UPLOAD_PIPELINE_OPENAI_DIMENSIONS"),
    ],
)
def test_what_cannot_work_stops_the_start_and_names_the_setting(values: dict[str, Any], named: str) -> None:
    with pytest.raises(PipelineError) as caught:
        open_embedder("openai", setting(**values))
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert caught.value.message.startswith(named)
    assert "sk-" not in caught.value.message


def test_a_missing_package_stops_the_start_and_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.machinery.PathFinder.find_spec

    def without_openai(name: str, *args: Any) -> Any:
        return None if name == "openai" else found(name, *args)

    monkeypatch.delitem(sys.modules, "openai", raising=False)
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", without_openai)
    with pytest.raises(PipelineError) as caught:
        open_embedder("openai", setting())
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert "upload-pipeline[openai]" in caught.value.message


# what comes back


async def test_rows_have_length_one_and_stand_in_the_order_of_the_texts(embedder: OpenAIEmbedder) -> None:
    vectors = await embedder.embed(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((3, 16), np.dtype("float32"))
    np.testing.assert_allclose(vectors, expected(TEXTS), rtol=1e-5)
    assert (await embedder.embed([])).shape == (0, 16)


async def test_one_request_holds_at_most_256_texts_and_stays_below_the_limit_of_tokens(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder
) -> None:
    many = [f"text {number}" for number in range(600)]
    np.testing.assert_allclose(await embedder.embed(many), expected(many), rtol=1e-4, atol=1e-6)
    assert simulator.books.requests == 3
    long = [f"{number} " + "ein " * 1990 for number in range(100)]
    await embedder.embed(long)
    assert simulator.books.too_large == 0
    assert simulator.books.paid_again() == {}
    assert simulator.books.largest_inputs == 256
    # of such texts the bound is what the server counts
    await embedder.embed([f"{number:03}" + "!" * 5000 for number in range(61)])
    assert simulator.books.too_large == 0
    assert 280_000 < simulator.books.largest_tokens < 300_000


async def test_vectors_are_asked_for_in_base64_and_a_server_that_knows_only_numbers_is_understood(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer = simulator.vectors

    def in_numbers(body: dict[str, Any], *rest: Any) -> web.Response:
        asked.append(body["encoding_format"])
        return answer({**body, "encoding_format": "float"}, *rest)

    monkeypatch.setattr(simulator, "vectors", in_numbers)
    np.testing.assert_allclose(await embedder.embed(["hail"]), expected(["hail"]), rtol=1e-4, atol=1e-6)
    assert asked == ["base64"]


async def test_texts_that_cannot_be_sent_as_they_are_are_embedded_all_the_same(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder
) -> None:
    vectors = await embedder.embed(["", " \n", "a\ud800b", "nul \0", "💧"])
    assert np.isfinite(vectors).all()
    assert simulator.books.paid == {" ": 2, "a?b": 1, "nul \0": 1, "💧": 1}


async def test_wrong_arguments_are_refused(embedder: OpenAIEmbedder) -> None:
    with pytest.raises(TypeError):
        await embedder.embed("water")
    with pytest.raises(TypeError):
        await embedder.embed([1])  # type: ignore[list-item]


# faults: one request


@pytest.mark.parametrize(
    ("fault", "code", "remedy"),
    [
        (Fault.RATE_LIMITED, ErrorCode.EMBED_FAILED, Remedy.WAIT),
        (Fault.QUOTA, ErrorCode.EMBED_QUOTA, Remedy.PAUSE),
        (Fault.UNAUTHORISED, ErrorCode.EMBED_DENIED, Remedy.PAUSE),
        (Fault.SERVER_ERROR, ErrorCode.EMBED_FAILED, Remedy.AGAIN),
        (Fault.REJECTED, ErrorCode.EMBED_REJECTED, Remedy.SPLIT),
        (Fault.DROPPED, ErrorCode.EMBED_FAILED, Remedy.AGAIN),
        (Fault.TRUNCATED, ErrorCode.EMBED_FAILED, Remedy.AGAIN),
        (Fault.WRONG_INDEX, ErrorCode.EMBED_FAILED, Remedy.AGAIN),
        (Fault.SHORT, ErrorCode.EMBED_FAILED, Remedy.AGAIN),
        (Fault.WRONG_DIMENSIONS, ErrorCode.EMBED_FAILED, Remedy.AGAIN),
        (Fault.EMPTY, ErrorCode.EMBED_FAILED, Remedy.AGAIN),
    ],
)
async def test_each_fault_of_a_request_has_its_code_and_remedy(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder, fault: Fault, code: ErrorCode, remedy: Remedy
) -> None:
    simulator.misbehave(fault, retry_after=300)
    with pytest.raises(EmbeddingError) as caught:
        await embedder.request(TEXTS)
    assert (caught.value.code, caught.value.remedy) == (code, remedy)
    assert KEY not in str(caught.value)
    assert (caught.value.headers.get("retry-after") == "300") == (fault is Fault.RATE_LIMITED)
    assert simulator.books.requests == 1
    assert (await embedder.request(TEXTS)).unusable == ()


TOO_LARGE = "Request too large for m in organization org-x on tokens per min (TPM): Limit 40000, Requested 77159. The …"
TOO_EARLY = (
    "Rate limit reached for m in organization org-x on tokens per min (TPM): Limit 10000, Used 8554, Requested 3082."
)
WITH_COMMAS = "Rate limit reached for m on tokens per min (TPM): Limit 1,000,000, Used 990,000, Requested {:,}."
NONE_OF_IT = "Rate limit reached for m in organization org-x on tokens per min (TPM): Limit 0, Used 0, Requested 12000."


@pytest.mark.parametrize(
    ("message", "kind", "code", "remedy", "minute"),
    [
        (TOO_LARGE, "tokens", ErrorCode.REQUEST_OVER_BUDGET, Remedy.SPLIT, 40_000),
        ("Too many tokens: Limit 9, Requested 10.", "x", ErrorCode.REQUEST_OVER_BUDGET, Remedy.SPLIT, None),
        ("Use fewer tokens.", "request_too_large", ErrorCode.REQUEST_OVER_BUDGET, Remedy.SPLIT, None),
        (WITH_COMMAS.format(2_000_000), "tokens", ErrorCode.REQUEST_OVER_BUDGET, Remedy.SPLIT, 1_000_000),
        (WITH_COMMAS.format(20_000), "tokens", ErrorCode.EMBED_FAILED, Remedy.WAIT, None),
        ("TPM: Limit 1.5M, Used 1.4M, Requested 200k.", "tokens", ErrorCode.EMBED_FAILED, Remedy.WAIT, None),
        ("TPM: Limit 1.5, Used 1.4, Requested 20.", "tokens", ErrorCode.EMBED_FAILED, Remedy.WAIT, None),
        (NONE_OF_IT, "tokens", ErrorCode.EMBED_QUOTA, Remedy.PAUSE, None),
        (TOO_EARLY, "tokens", ErrorCode.EMBED_FAILED, Remedy.WAIT, None),
        ("Rate limit reached: Limit 3, Used 3, Requested 1.", "requests", ErrorCode.EMBED_FAILED, Remedy.WAIT, None),
        ("Slow down.", "tokens", ErrorCode.EMBED_FAILED, Remedy.WAIT, None),
    ],
)
async def test_a_request_larger_than_a_minute_is_told_from_one_that_came_too_early(
    simulator: OpenAISimulator,
    embedder: OpenAIEmbedder,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    kind: str,
    code: ErrorCode,
    remedy: Remedy,
    minute: int | None,
) -> None:
    monkeypatch.setattr(simulator, "full", lambda *_: refusal(429, message, kind=kind, code="rate_limit_exceeded"))
    with pytest.raises(EmbeddingError) as caught:
        await embedder.request(TEXTS)
    assert (caught.value.code, caught.value.remedy, caught.value.minute) == (code, remedy, minute)


async def test_what_is_larger_than_a_minute_is_sent_by_halves_and_one_text_is_refused_with_limit_and_remedy() -> None:
    async with OpenAISimulator(tokens_per_minute=10, tells_too_large=True) as small:
        embedder = OpenAIEmbedder(api_key=KEY, base_url=small.url, model="text-embedding-3-small", dimensions=16)
        with pytest.raises(PipelineError) as caught:
            await embedder.embed(["one two three", "a b c d e f g h i j k"])
        assert caught.value.code is ErrorCode.REQUEST_OVER_BUDGET
        assert "10 tokens in a minute" in caught.value.message
        assert "UPLOAD_PIPELINE_CHUNK_TARGET_CHARS" in caught.value.message
        assert (small.books.requests, small.books.over_limit, small.books.tokens) == (3, 2, 3)
        await embedder.close()


async def test_an_answer_in_another_order_is_put_in_order(simulator: OpenAISimulator, embedder: OpenAIEmbedder) -> None:
    simulator.misbehave(Fault.SHUFFLED)
    answer = await embedder.request(TEXTS)
    np.testing.assert_allclose(answer.vectors, expected(TEXTS), rtol=1e-5)
    assert answer.tokens == 4
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000000000"


@pytest.mark.parametrize(
    ("told", "tokens"), [(7, 7), (0, 0), ("7", None), (7.0, None), (-1, None), (True, None), (10**30, None), ([], None)]
)
async def test_a_count_of_tokens_that_is_none_counts_as_not_told(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder, monkeypatch: pytest.MonkeyPatch, told: Any, tokens: int | None
) -> None:
    given = simulator.vectors
    monkeypatch.setattr(simulator, "vectors", lambda body, inputs, counted, fault: given(body, inputs, told, fault))
    answer = await embedder.request(TEXTS)
    assert (answer.tokens, type(answer.tokens)) == (tokens, type(tokens))
    np.testing.assert_allclose(answer.vectors, expected(TEXTS), rtol=1e-5)


async def test_a_vector_that_is_no_direction_is_told_and_the_others_are_good(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder
) -> None:
    simulator.poison["hail"] = Fault.NAN
    answer = await embedder.request(TEXTS)
    assert answer.unusable == (1,)
    np.testing.assert_allclose(answer.vectors[[0, 2]], expected(["water damage", "roof"]), rtol=1e-5)


async def test_a_vector_whose_length_is_no_number_of_its_kind_is_no_direction(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    vast = base64.b64encode(np.full(embedder.dimensions, 3e38, "<f4").tobytes()).decode()
    answer = {"data": [{"index": 0, "embedding": vast}], "usage": {"prompt_tokens": 1}}
    monkeypatch.setattr(simulator, "vectors", lambda *_: web.json_response(answer))
    assert (await embedder.request(["one"])).unusable == (0,)


@pytest.mark.parametrize("param", [["input", 0], {"input": 0}, 7])
async def test_a_refusal_that_names_no_parameter_as_others_do_is_one_of_what_was_sent(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder, monkeypatch: pytest.MonkeyPatch, param: Any
) -> None:
    monkeypatch.setattr(simulator, "vectors", lambda *_: refusal(400, "This is no text.", param=param))
    with pytest.raises(EmbeddingError) as caught:
        await embedder.request(TEXTS)
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.EMBED_REJECTED, Remedy.SPLIT)


async def test_a_request_without_end_ends_in_time(simulator: OpenAISimulator) -> None:
    embedder = OpenAIEmbedder(api_key=KEY, base_url=simulator.url, model="text-embedding-3-small", timeout=0.3)
    simulator.misbehave(Fault.HANG)
    began = time.monotonic()
    with pytest.raises(EmbeddingError) as caught:
        await embedder.request(TEXTS)
    assert caught.value.remedy is Remedy.AGAIN
    assert not caught.value.answered
    assert time.monotonic() - began < 30
    await embedder.close()


async def test_a_server_that_is_not_there_is_told(simulator: OpenAISimulator, embedder: OpenAIEmbedder) -> None:
    await simulator.__aexit__()
    with pytest.raises(EmbeddingError) as caught:
        await embedder.request(TEXTS)
    assert "cannot be reached" in caught.value.message


async def test_a_model_that_does_not_exist_is_a_matter_of_settings(simulator: OpenAISimulator) -> None:
    embedder = OpenAIEmbedder(api_key=KEY, base_url=simulator.url, model="bge-m3", dimensions=8)
    with pytest.raises(EmbeddingError) as caught:
        await embedder.request(TEXTS)
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.EMBED_DENIED, Remedy.PAUSE)
    await embedder.close()


# faults: somebody waits


async def test_what_passes_is_tried_again_a_few_times(simulator: OpenAISimulator, embedder: OpenAIEmbedder) -> None:
    simulator.misbehave(Fault.SERVER_ERROR)
    simulator.misbehave(Fault.RATE_LIMITED, retry_after=0.1)
    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-5)
    simulator.misbehave(Fault.NAN)
    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-5)
    simulator.misbehave(Fault.SERVER_ERROR, times=3)
    with pytest.raises(PipelineError) as caught:
        await embedder.embed(TEXTS)
    assert caught.value.code is ErrorCode.EMBED_FAILED


@pytest.mark.parametrize("fault", [Fault.QUOTA, Fault.UNAUTHORISED, Fault.RATE_LIMITED])
async def test_what_does_not_pass_soon_is_not_tried_again(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder, fault: Fault
) -> None:
    simulator.misbehave(fault, retry_after=300)
    with pytest.raises(PipelineError):
        await embedder.embed(TEXTS)
    assert simulator.books.requests == 1


async def test_a_poison_text_is_found_by_halves_and_fails_alone(
    simulator: OpenAISimulator, embedder: OpenAIEmbedder
) -> None:
    simulator.misbehave(Fault.REJECTED)
    assert (await embedder.embed(TEXTS)).shape == (3, 16)
    simulator.poison["hail"] = Fault.REJECTED
    with pytest.raises(PipelineError) as caught:
        await embedder.embed(TEXTS)
    assert caught.value.code is ErrorCode.EMBED_REJECTED
