"""Standing in line for a budget: places are taken, kept and lost."""

from __future__ import annotations

from uuid import uuid4

import asyncpg
import pytest
from budget_verbs import KEY, at, grant, refuse
from sessions import Connection
from verbs import value

from upload_pipeline.database.provider_budget import Granted, Wait, release, reserve_in_turn, settle


async def test_a_small_call_does_not_pass_a_large_one_that_asked_before(budget_db: asyncpg.Connection) -> None:
    first = await grant(budget_db, 50, token_limit=100)
    large = await refuse(budget_db, 90, token_limit=100)
    small = await refuse(budget_db, 20, token_limit=100)
    # what fits beside it may go
    await grant(budget_db, 0, token_limit=100)
    assert await settle(budget_db, first)
    await at(budget_db, 60.1)
    await refuse(budget_db, 20, token_limit=100, reservation_id=small.reservation_id)
    await grant(budget_db, 90, token_limit=100, reservation_id=large.reservation_id)
    await refuse(budget_db, 10, token_limit=100, reservation_id=(late := uuid4()))
    await release(budget_db, small.reservation_id)
    await grant(budget_db, 10, token_limit=100, reservation_id=late)


async def test_what_would_be_gone_in_time_may_be_used_meanwhile(budget_db: asyncpg.Connection) -> None:
    await settle(budget_db, await grant(budget_db, 80, token_limit=100))
    await at(budget_db, 30)
    large = await refuse(budget_db, 80, token_limit=100)
    # at second 60 there is room for the large one and twenty others
    await grant(budget_db, 15, token_limit=100)
    late = await refuse(budget_db, 10, token_limit=100)
    await at(budget_db, 60.1)
    await refuse(budget_db, 10, token_limit=100, reservation_id=late.reservation_id)
    await grant(budget_db, 80, token_limit=100, reservation_id=large.reservation_id)


async def test_who_does_not_come_back_loses_the_place(budget_db: asyncpg.Connection) -> None:
    await settle(budget_db, await grant(budget_db, 100, token_limit=100))
    wait = await refuse(budget_db, 100, token_limit=100)
    await at(budget_db, wait.seconds + 14)
    await refuse(budget_db, 1, token_limit=100)
    await at(budget_db, wait.seconds + 15.1)
    await grant(budget_db, 1, token_limit=100)


async def test_waiting_longer_than_allowed_gives_the_place_up(budget_db: asyncpg.Connection, admin: Connection) -> None:
    await settle(budget_db, await grant(budget_db, 100, token_limit=100))

    async def never(seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s")

    answer = await reserve_in_turn(
        budget_db, **KEY, requests=1, tokens=50, longest=30, token_limit=100, sleep=never, clock=lambda: 0.0
    )
    assert isinstance(answer, Wait)
    assert answer.seconds == pytest.approx(60, abs=0.1)
    query = "select count(*) from upload_pipeline.provider_reservations where granted_at is null"
    assert value(admin, query) == 0


async def test_a_place_can_be_kept_by_who_comes_back_later(budget_db: asyncpg.Connection) -> None:
    await settle(budget_db, await grant(budget_db, 100, token_limit=100))
    answer = await reserve_in_turn(
        budget_db, **KEY, requests=1, tokens=100, longest=5, token_limit=100, keep_place=True, clock=lambda: 0.0
    )
    assert isinstance(answer, Wait)
    await at(budget_db, 65)
    await refuse(budget_db, 1, token_limit=100)
    again = await reserve_in_turn(
        budget_db, **KEY, requests=1, tokens=90, longest=5, token_limit=100, reservation_id=answer.reservation_id
    )
    assert again == Granted(answer.reservation_id, 120)
    # it came back with less, and that is what counts
    await grant(budget_db, 9, token_limit=100)
