"""Calls of a budget, one after the other: what counts, how long, and what it costs to ask."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from budget_verbs import KEY, ask, at, grant, refuse, sums_are_those_of_the_rows
from sessions import Connection
from verbs import EPOCH

from upload_pipeline.database.provider_budget import Granted, release, reserve, settle
from upload_pipeline.errors import ErrorCode, PipelineError


async def test_a_budget_is_not_reserved_on_an_old_snapshot(budget_db: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.PostgresError, match="READ COMMITTED"):
        async with budget_db.transaction(isolation="repeatable_read"):
            await ask(budget_db, request_limit=1)


async def test_a_call_counts_until_a_minute_after_its_settlement(budget_db: asyncpg.Connection) -> None:
    call = await grant(budget_db, request_limit=1)
    await at(budget_db, 50)
    wait = await refuse(budget_db, request_limit=1)
    assert wait.seconds == pytest.approx(60, abs=0.1)
    assert await settle(budget_db, call)
    await at(budget_db, 110)
    await refuse(budget_db, request_limit=1, reservation_id=wait.reservation_id)
    await at(budget_db, 110.1)
    await grant(budget_db, request_limit=1, reservation_id=wait.reservation_id)


async def test_the_wait_that_is_told_is_enough(budget_db: asyncpg.Connection) -> None:
    for second in (0, 1, 2):
        await at(budget_db, second)
        await settle(budget_db, await grant(budget_db, 100, token_limit=300))
    await at(budget_db, 3)
    wait = await refuse(budget_db, 150, token_limit=300)
    assert wait.seconds == pytest.approx(58, abs=0.1)  # the first two are over at second 61
    await at(budget_db, 3 + wait.seconds)
    await grant(budget_db, 150, token_limit=300, reservation_id=wait.reservation_id)


async def test_what_was_reserved_too_much_is_free_once_it_is_settled(budget_db: asyncpg.Connection) -> None:
    call = await grant(budget_db, 900, token_limit=1000)
    await refuse(budget_db, 200, token_limit=1000, reservation_id=(waiting := uuid4()))
    assert await settle(budget_db, call, tokens=100)
    await grant(budget_db, 200, token_limit=1000, reservation_id=waiting)
    await grant(budget_db, 700, token_limit=1000)
    await refuse(budget_db, 1, token_limit=1000)


async def test_a_call_that_was_never_made_is_free_at_once(budget_db: asyncpg.Connection) -> None:
    call = await grant(budget_db, 5, request_limit=1)
    assert await release(budget_db, call)
    assert not await release(budget_db, call)
    await grant(budget_db, request_limit=1)


async def test_a_call_that_nobody_settles_counts_as_made_at_its_end(
    budget_db: asyncpg.Connection, admin: Connection
) -> None:
    life = timedelta(seconds=30)
    call = await grant(budget_db, 10, token_limit=10, life=life)
    await at(budget_db, 90)
    wait = await refuse(budget_db, 10, token_limit=10)
    await at(budget_db, 90.1)
    # nothing is in the way but a place in line that is not taken up again
    assert (await refuse(budget_db, 10, token_limit=10)).seconds == pytest.approx(wait.seconds + 15, abs=0.2)
    await grant(budget_db, 10, token_limit=10, reservation_id=wait.reservation_id)
    assert not await settle(budget_db, call, tokens=1)
    assert sums_are_those_of_the_rows(admin)


async def test_settling_late_or_twice_counts_once(budget_db: asyncpg.Connection, admin: Connection) -> None:
    call = await grant(budget_db, 10, request_limit=1, life=timedelta(seconds=30))
    await at(budget_db, 80)  # after its end, while it still counts
    assert await settle(budget_db, call, tokens=4)
    await at(budget_db, 100)
    assert await settle(budget_db, call, tokens=9)
    await at(budget_db, 139)
    await refuse(budget_db, request_limit=1, reservation_id=(waiting := uuid4()))
    await at(budget_db, 140.1)
    await grant(budget_db, request_limit=1, reservation_id=waiting)
    assert sums_are_those_of_the_rows(admin)
    assert not await settle(budget_db, uuid4(), tokens=1)


async def test_asking_again_after_a_lost_answer_is_granted_once(
    budget_db: asyncpg.Connection, admin: Connection
) -> None:
    call = uuid4()
    assert await ask(budget_db, 10, request_limit=1, reservation_id=call) == Granted(call, 120)
    await at(budget_db, 20)
    assert await ask(budget_db, 10, request_limit=1, reservation_id=call) == Granted(call, 100)
    assert sums_are_those_of_the_rows(admin)


async def test_what_a_whole_minute_cannot_hold_is_an_error_and_waits_for_nothing(budget_db: asyncpg.Connection) -> None:
    with pytest.raises(PipelineError, match=r"1 call.* of 1001 tokens .* 1000 tokens") as caught:
        await ask(budget_db, 1001, token_limit=1000)
    assert caught.value.code is ErrorCode.REQUEST_OVER_BUDGET
    assert not caught.value.retryable
    with pytest.raises(PipelineError, match="3 calls"):
        await ask(budget_db, requests=4, request_limit=3)
    await grant(budget_db, 1000, token_limit=1000)


async def test_budgets_of_other_keys_and_models_are_others(budget_db: asyncpg.Connection) -> None:
    for other in ({}, {"model": "n"}, {"key_id": "ffffffffffffffff"}, {"provider": "elsewhere"}):
        answer = await reserve(budget_db, **{**KEY, **other}, requests=1, tokens=0, request_limit=1)
        assert isinstance(answer, Granted)
    await refuse(budget_db, request_limit=1)


async def test_a_key_itself_is_not_taken(budget_db: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await reserve(budget_db, provider="p", key_id="sk-secret", model="m", requests=1, tokens=0)


async def test_many_calls_in_a_minute_cost_no_more_than_few(budget_db: asyncpg.Connection) -> None:
    """The buffers that a grant and a refusal touch do not grow with what the minute holds."""

    async def touched() -> int:
        plan = await budget_db.fetchval(
            "explain (analyze, buffers, format json) select * from upload_pipeline.reserve_calls("
            "gen_random_uuid(), 'hosted', '0123456789abcdef', 'm', 1, 10, 100000, 10000000)"
        )
        import json

        node = json.loads(plan)[0]["Plan"]
        return int(node["Shared Hit Blocks"]) + int(node["Shared Read Blocks"])

    await grant(budget_db, request_limit=1000)
    await touched()
    few = await touched()
    for _ in range(3000):
        await grant(budget_db, 10, request_limit=100_000)
    assert await touched() <= few + 30


def test_the_epoch_is_not_the_present() -> None:
    assert abs(EPOCH - datetime.now(UTC)) > timedelta(days=365)
