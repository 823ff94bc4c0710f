"""Limits of a period that is no minute: what counts, until when, and what a wait is."""

from __future__ import annotations

from datetime import timedelta

import asyncpg
import pytest
from budget_verbs import ask, at, grant, refuse

from upload_pipeline.database.provider_budget import settle
from upload_pipeline.errors import PipelineError

TEN = {"period": timedelta(seconds=10), "request_limit": 2}


async def test_a_call_counts_for_its_period_from_its_end_and_the_wait_is_until_then(
    budget_db: asyncpg.Connection,
) -> None:
    first, second = await grant(budget_db, **TEN), await grant(budget_db, **TEN)
    await at(budget_db, 1)
    await settle(budget_db, first)
    await at(budget_db, 4)
    await settle(budget_db, second)
    waiting = await refuse(budget_db, **TEN)
    assert waiting.seconds == pytest.approx(7, abs=0.1)
    await at(budget_db, 11)
    assert (await refuse(budget_db, reservation_id=waiting.reservation_id, **TEN)).seconds < 0.1
    await at(budget_db, 11.1)
    await grant(budget_db, reservation_id=waiting.reservation_id, **TEN)
    assert (await refuse(budget_db, **TEN)).seconds == pytest.approx(2.9, abs=0.1)


async def test_a_call_that_nobody_settles_counts_for_a_period_behind_its_life(budget_db: asyncpg.Connection) -> None:
    life = timedelta(seconds=30)
    for _ in range(2):
        await grant(budget_db, life=life, **TEN)
    waiting = await refuse(budget_db, **TEN)
    assert waiting.seconds == pytest.approx(10, abs=0.1)
    for moment, seconds in ((10, 10), (20, 10), (30, 10), (35, 5)):
        await at(budget_db, moment)
        answer = await refuse(budget_db, reservation_id=waiting.reservation_id, **TEN)
        assert answer.seconds == pytest.approx(seconds, abs=0.1)
    await at(budget_db, 40.1)
    await grant(budget_db, reservation_id=waiting.reservation_id, **TEN)


async def test_asking_again_is_answered_with_what_is_left_of_the_calls_life(budget_db: asyncpg.Connection) -> None:
    granted = await grant(budget_db, life=timedelta(seconds=30), **TEN)
    await at(budget_db, 12)
    assert (await ask(budget_db, reservation_id=granted, **TEN)).seconds == pytest.approx(18, abs=0.1)


async def test_more_than_a_period_holds_names_the_period(budget_db: asyncpg.Connection) -> None:
    with pytest.raises(PipelineError, match=r"3 call\(s\) of 0 tokens are more than a whole 00:00:10 .* 2 calls"):
        await ask(budget_db, requests=3, **TEN)


async def test_a_period_of_no_time_is_refused(budget_db: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="provider_reservations_period"):
        await ask(budget_db, period=timedelta(0), request_limit=2)
