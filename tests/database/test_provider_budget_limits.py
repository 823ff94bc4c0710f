"""Limits that a provider tells with its answers, and what its other callers use."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import asyncpg
import pytest
from budget_verbs import KEY, ask, at, grant, refuse, sums_are_those_of_the_rows, told
from sessions import Connection

from upload_pipeline.database.provider_budget import Granted, freeze, release, settle
from upload_pipeline.errors import PipelineError
from upload_pipeline.rate_headers import RateLimits


async def test_one_call_finds_the_limits_out_before_others_go(budget_db: asyncpg.Connection) -> None:
    first = await grant(budget_db)
    second = await refuse(budget_db)
    # no answer came: still unknown
    assert await settle(budget_db, first)
    third = await refuse(budget_db)
    assert await ask(budget_db, reservation_id=second.reservation_id) == Granted(second.reservation_id, 120)
    assert await settle(budget_db, second.reservation_id, limits=RateLimits(requests=4))
    await grant(budget_db, reservation_id=third.reservation_id)
    await grant(budget_db)
    await refuse(budget_db)  # the limit is four, and the first call may have been made


async def test_another_finds_the_limits_out_soon_after_the_first_has_died(
    budget_db: asyncpg.Connection, admin: Connection
) -> None:
    await at(budget_db, 0)
    late = await grant(budget_db, 10)
    second = await refuse(budget_db, 10)
    third = await refuse(budget_db, 10)
    await at(budget_db, 14)
    await refuse(budget_db, 10, reservation_id=second.reservation_id)
    await refuse(budget_db, 10, reservation_id=third.reservation_id)
    await at(budget_db, 20)
    await grant(budget_db, 10, reservation_id=second.reservation_id)
    await refuse(budget_db, 10, reservation_id=third.reservation_id)  # one at a time still
    # what the first has sent counts against the limit that the second is told
    assert await settle(budget_db, second.reservation_id, limits=RateLimits(requests=3))
    await grant(budget_db, 10, reservation_id=third.reservation_id)
    await refuse(budget_db, 10, reservation_id=(waiting := uuid4()))
    # it was only slow: it counts once, from its answer on
    await at(budget_db, 25)
    assert await settle(budget_db, late, tokens=7, limits=RateLimits(requests=3))
    await refuse(budget_db, 10, reservation_id=waiting)
    assert sums_are_those_of_the_rows(admin)


async def test_a_provider_that_tells_no_limits_has_none(budget_db: asyncpg.Connection) -> None:
    await told(budget_db, RateLimits())
    for _ in range(50):
        await grant(budget_db, 10**6)


async def test_the_lesser_of_what_is_told_and_what_is_set_holds(budget_db: asyncpg.Connection) -> None:
    await told(budget_db, RateLimits(requests=3, tokens=100))
    await grant(budget_db, 10, request_limit=1000, token_limit=50)
    await refuse(budget_db, 45, request_limit=1000, token_limit=50)
    with pytest.raises(PipelineError, match="100 tokens"):
        await ask(budget_db, 101, token_limit=5000)


async def test_a_limit_that_changed_holds_from_the_answer_that_told_it(budget_db: asyncpg.Connection) -> None:
    await told(budget_db, RateLimits(requests=3))
    await settle(budget_db, await grant(budget_db), limits=RateLimits(requests=1))
    waiting = (await refuse(budget_db)).reservation_id
    await at(budget_db, 61)
    call = await grant(budget_db, reservation_id=waiting)
    await settle(budget_db, call, limits=RateLimits(requests=2))
    await grant(budget_db)


async def test_what_others_use_of_the_key_is_left_to_them_until_it_is_free_again(budget_db: asyncpg.Connection) -> None:
    limits = RateLimits(requests=100, requests_remaining=100, tokens=1000, tokens_remaining=1000)
    await told(budget_db, limits)
    seen = replace(limits, requests_remaining=97, requests_reset=2, tokens_remaining=100, tokens_reset=54)
    assert await settle(budget_db, await grant(budget_db, 50), limits=seen)  # 850 of the 900 are not ours
    await refuse(budget_db, 101, reservation_id=(waiting := uuid4()))
    assert (await refuse(budget_db, 101, reservation_id=waiting)).seconds == pytest.approx(54, abs=0.1)
    await release(budget_db, waiting)
    await grant(budget_db, 100)
    await at(budget_db, 55)
    await grant(budget_db, 850)


async def test_our_own_calls_are_not_taken_for_others(budget_db: asyncpg.Connection) -> None:
    await told(budget_db, RateLimits(requests=10))
    calls = [await grant(budget_db, 5) for _ in range(5)]
    # the provider has seen three of the five when it answers the first
    await settle(budget_db, calls[0], limits=RateLimits(requests=10, requests_remaining=7, requests_reset=60))
    for _ in range(5):
        await grant(budget_db)
    await refuse(budget_db)


async def test_nothing_is_granted_until_retry_after_and_the_line_stands_as_before(
    budget_db: asyncpg.Connection,
) -> None:
    await told(budget_db, RateLimits(requests=2))
    call = await grant(budget_db)
    await settle(budget_db, call, limits=RateLimits(retry_after=300))
    wait = await refuse(budget_db)
    assert wait.seconds == pytest.approx(300)
    await freeze(budget_db, **KEY, seconds=10)  # sooner than what stands
    await at(budget_db, 299)
    await refuse(budget_db, reservation_id=wait.reservation_id)
    await at(budget_db, 300)
    await grant(budget_db, reservation_id=wait.reservation_id)


async def test_a_budget_can_be_frozen_before_its_first_call(budget_db: asyncpg.Connection) -> None:
    await freeze(budget_db, **KEY, seconds=7)
    assert (await refuse(budget_db)).seconds == pytest.approx(7)
