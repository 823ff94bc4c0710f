"""What jobs that share a request are answerable for."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upload_pipeline.database.queue import ClaimedJob, Lease
from upload_workers.embedding_line import Line
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


def a_job(user: UUID) -> ClaimedJob:
    return ClaimedJob(Lease(uuid4(), 1), uuid4(), user, "document", "embedding", 0, "")


@pytest.mark.parametrize(("counted", "expected"), [(90, [60, 30]), (None, [6, 3])])
def test_each_job_has_its_part_and_the_call_counts_once(counted: int | None, expected: list[int]) -> None:
    line, (first, second) = Line(), (a_job(uuid4()), a_job(uuid4()))
    line.join(first, ["aaaaaaaaa 1", "b"])
    line.join(second, ["aaa 1"])
    used = usage_of_request(line.take(10, 1000), provider="openai", model="m", tokens=counted)
    assert [(one.job_id, one.user_id, one.requests, one.tokens) for one in used] == [
        (first.job_id, first.user_id, 1, expected[0]),
        (second.job_id, second.user_id, 0, expected[1]),
    ]
    assert len({one.usage_id for one in used}) == 2


def test_a_text_of_a_job_that_has_gone_is_still_that_jobs_unless_another_waits_for_it() -> None:
    line, user = Line(), uuid4()
    gone, stays = a_job(user), a_job(user)
    ticket = line.join(gone, ["one", "two", "shared"])
    line.join(stays, ["shared", "four"])
    part = line.take(10, 1000)
    line.withdraw(ticket)
    used = usage_of_request(part, provider="openai", model="m", tokens=6)
    assert [(one.job_id, one.tokens, one.cached) for one in used] == [(gone.job_id, 2, 0), (stays.job_id, 4, 0)]
    assert line.take(10, 1000) == []
