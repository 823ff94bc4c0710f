"""Budgets under load: never over the limit in any period, whoever asks, crashes, or waits; and nobody starves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from budget_verbs import KEY, ask, sums_are_those_of_the_rows
from sessions import Connection
from virtual_time import ClockedConnection, VirtualTime

from upload_pipeline.database.connection import connect
from upload_pipeline.database.provider_budget import Granted, release, reserve_in_turn, settle

WORKERS = 16


@asynccontextmanager
async def worker_connections(database: Any, count: int = WORKERS) -> AsyncIterator[list[asyncpg.Connection]]:
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = await connect(database.worker_url)
            stack.push_async_callback(connection.close)
            opened.append(connection)
        yield opened


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call as the provider sees it."""

    at: float
    tokens: int


def fullest(arrivals: Sequence[Arrival], period: float) -> tuple[int, int]:
    """The most calls and the most tokens that any period holds, both its ends among it."""
    ordered = sorted(arrivals, key=lambda arrival: arrival.at)
    most_calls = most_tokens = tokens = first = 0
    for last, arrival in enumerate(ordered):
        tokens += arrival.tokens
        while arrival.at - ordered[first].at > period:
            tokens -= ordered[first].tokens
            first += 1
        most_calls = max(most_calls, last - first + 1)
        most_tokens = max(most_tokens, tokens)
    return most_calls, most_tokens


async def drive(
    database: Any,
    seed: int,
    minutes: float,
    request_limit: int,
    token_limit: int,
    largest: int,
    *,
    slowest: float = 20,
    period: float = 60,
) -> tuple[list[Arrival], list[Arrival], dict[int, list[float]]]:
    """Sixteen workers that call as often as they may, at a clock of their own.

    Returns:
        What arrived, at any moment between a grant and its settlement; what was granted; and for each worker how long
        each call waited.
    """
    arrivals: list[Arrival] = []
    granted: list[Arrival] = []
    waits: dict[int, list[float]] = {number: [] for number in range(WORKERS)}
    time = VirtualTime()

    async def work(number: int, connection: asyncpg.Connection) -> None:
        chance = random.Random(seed * 100 + number)
        db = ClockedConnection(connection, time)
        while True:
            # one worker always wants nearly all there is, and the others small change
            tokens = token_limit * 9 // 10 if number == 0 else chance.randint(1, largest)
            began = time.now
            answer = await reserve_in_turn(
                db, **KEY, requests=1, tokens=tokens, longest=1e6, request_limit=request_limit, token_limit=token_limit,
                sleep=time.sleep, clock=lambda: time.now, life=timedelta(seconds=30), period=timedelta(seconds=period),
            )  # fmt: skip
            assert isinstance(answer, Granted)
            waits[number].append(time.now - began)
            fate = chance.random()
            if fate < 0.05:
                assert await release(db, answer.reservation_id)
                await time.sleep(chance.uniform(0, 1))
                continue
            lasts = chance.uniform(0, 1) ** 3 * slowest
            used = tokens if fate < 0.5 else chance.randint(0, tokens)
            granted.append(Arrival(time.now, tokens))
            arrivals.append(Arrival(time.now + chance.choice((0, 1, chance.random())) * lasts, used))
            if fate < 0.1:
                # killed: what it reserved is settled by nobody, and it comes back as another
                await time.sleep(chance.uniform(0, lasts))
                continue
            await time.sleep(lasts)
            await settle(db, answer.reservation_id, tokens=used)

    async with worker_connections(database) as connections:
        await time.run((work(number, one) for number, one in enumerate(connections)), until=minutes * 60)
    return arrivals, granted, waits


@pytest.mark.parametrize(
    ("seed", "minutes", "request_limit", "token_limit", "largest", "period"),
    [
        pytest.param(1, 12, 120, 10**9, 1000, 60, id="calls are scarce"),
        pytest.param(2, 30, 10_000, 20_000, 1000, 60, id="tokens are scarce"),
        pytest.param(3, 240, 300, 60_000, 1000, 60, id="both, for long", marks=pytest.mark.slow),
        pytest.param(5, 4, 20, 10**9, 1000, 10, id="calls of ten seconds are scarce"),
    ],
)
async def test_no_period_at_the_provider_ever_holds_more_than_the_limit(
    database: Any,
    admin: Connection,
    seed: int,
    minutes: int,
    request_limit: int,
    token_limit: int,
    largest: int,
    period: int,
) -> None:
    arrivals, granted, _ = await drive(
        database, seed, minutes, request_limit, token_limit, largest, slowest=period / 3, period=period
    )
    calls, tokens = fullest(arrivals, period)
    assert calls <= request_limit
    assert tokens <= token_limit
    # and it is the limit that held it back, not something smaller
    periods = minutes * 60 / period
    used = max(len(granted) / request_limit, sum(call.tokens for call in granted) / token_limit) / periods
    assert used > 0.6
    assert sums_are_those_of_the_rows(admin)


async def test_nobody_starves(database: Any) -> None:
    _, _, waits = await drive(database, seed=4, minutes=30, request_limit=10_000, token_limit=20_000, largest=1000)
    # what wants nine tenths of a minute gets it after at most what stood before it, and the end of the minute
    assert len(waits[0]) >= 8
    assert max(waits[0]) <= 300
    for number in range(1, WORKERS):
        assert len(waits[number]) >= 8, number
        assert max(waits[number]) <= 300, number


async def test_sixteen_connections_that_ask_at_once_are_granted_the_limit_and_not_one_more(database: Any) -> None:
    async def take(connection: asyncpg.Connection) -> int:
        return sum([isinstance(await ask(connection, 7, request_limit=300), Granted) for _ in range(40)])

    async with worker_connections(database) as connections:
        assert sum(await asyncio.gather(*map(take, connections))) == 300
