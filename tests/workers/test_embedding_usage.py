"""What jobs that share a request are answerable for."""

from __future__ import annotations

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upload_workers.embedding_usage import split_tokens, usage_of_request


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_the_parts_are_the_whole_and_in_proportion(tokens: int, weights: list[int]) -> None:
    parts = split_tokens(tokens, weights)
    assert sum(parts) == tokens
    assert min(parts) >= 0
    if total := sum(weights):
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part - tokens * weight / total) <= 1


def test_what_weighs_nothing_is_shared_alike() -> None:
    assert split_tokens(5, [0, 0]) == [2, 3]


@pytest.mark.parametrize(("counted", "expected"), [(90, [60, 30]), (None, [20, 10])])
def test_each_job_has_its_part_and_the_call_counts_once(counted: int | None, expected: list[int]) -> None:
    first, second = uuid4(), uuid4()
    used = usage_of_request(provider="openai", model="m", weights={first: 20, second: 10}, tokens=counted)
    assert [(one.job_id, one.requests, one.tokens) for one in used] == [
        (first, 1, expected[0]),
        (second, 0, expected[1]),
    ]
    assert len({one.usage_id for one in used}) == 2
    assert usage_of_request(provider="openai", model="m", weights={}, tokens=3) == []
