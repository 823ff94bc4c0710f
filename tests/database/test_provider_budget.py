"""Budgets of hosted providers: never over the limit in any minute, whoever asks, crashes, or waits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sessions import Connection
from verbs import EPOCH, value
from virtual_time import ClockedConnection, VirtualTime

from upload_pipeline.database.connection import connect
from upload_pipeline.database.provider_budget import (
    Granted,
    Wait,
    freeze,
    release,
    reserve,
    reserve_in_turn,
    settle,
)
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.rate_headers import RateLimits

KEY = {"provider": "hosted", "key_id": "0123456789abcdef", "model": "m"}
WORKERS = 16


@pytest.fixture
async def budget_db(database: Any) -> AsyncIterator[asyncpg.Connection]:
    """Role `upload_worker`, at second 0."""
    connection = await connect(database.worker_url)
    await at(connection, 0)
    yield connection
    await connection.close()


@asynccontextmanager
async def worker_connections(database: Any, count: int = WORKERS) -> AsyncIterator[list[asyncpg.Connection]]:
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = await connect(database.worker_url)
            stack.push_async_callback(connection.close)
            opened.append(connection)
        yield opened


async def at(db: asyncpg.Connection, seconds: float) -> None:
    await db.execute(f"set upload_pipeline.now = '{(EPOCH + timedelta(seconds=seconds)).isoformat()}'")


async def ask(db: Any, tokens: int = 0, requests: int = 1, **options: Any) -> Granted | Wait:
    return await reserve(db, **KEY, requests=requests, tokens=tokens, **options)


async def grant(db: Any, tokens: int = 0, **options: Any) -> UUID:
    answer = await ask(db, tokens, **options)
    assert isinstance(answer, Granted), answer
    return answer.reservation_id


async def refuse(db: Any, tokens: int = 0, **options: Any) -> Wait:
    answer = await ask(db, tokens, **options)
    assert isinstance(answer, Wait), answer
    return answer


async def told(db: Any, limits: RateLimits) -> None:
    """One call has found the limits out, so long ago that it counts no more."""
    await at(db, -1000)
    assert await settle(db, await grant(db), limits=limits)
    await at(db, 0)


def sums_are_those_of_the_rows(admin: Connection) -> bool:
    return bool(
        value(
            admin,
            """
            select bool_and((b.calls, b.tokens) = (
                     select coalesce(sum(r.calls), 0), coalesce(sum(r.tokens), 0)
                       from upload_pipeline.provider_reservations r
                      where r.budget_id = b.budget_id and r.granted_at is not null))
              from upload_pipeline.provider_budgets b
            """,
        )
    )


# exact


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call as the provider sees it."""

    at: float
    tokens: int


def fullest_minute(arrivals: Sequence[Arrival]) -> tuple[int, int]:
    """The most calls and the most tokens that any minute holds, both its ends among it."""
    ordered = sorted(arrivals, key=lambda arrival: arrival.at)
    most_calls = most_tokens = tokens = first = 0
    for last, arrival in enumerate(ordered):
        tokens += arrival.tokens
        while arrival.at - ordered[first].at > 60:
            tokens -= ordered[first].tokens
            first += 1
        most_calls = max(most_calls, last - first + 1)
        most_tokens = max(most_tokens, tokens)
    return most_calls, most_tokens


async def drive(
    database: Any, seed: int, minutes: float, request_limit: int, token_limit: int, largest: int, *, slowest: float = 20
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
                sleep=time.sleep, clock=lambda: time.now, life=timedelta(seconds=30),
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
    ("seed", "minutes", "request_limit", "token_limit", "largest"),
    [
        pytest.param(1, 12, 120, 10**9, 1000, id="calls are scarce"),
        pytest.param(2, 30, 10_000, 20_000, 1000, id="tokens are scarce"),
        pytest.param(3, 240, 300, 60_000, 1000, id="both, for long", marks=pytest.mark.slow),
    ],
)
async def test_no_minute_at_the_provider_ever_holds_more_than_the_limit(
    database: Any,
    admin: Connection,
    seed: int,
    minutes: int,
    request_limit: int,
    token_limit: int,
    largest: int,
) -> None:
    arrivals, granted, _ = await drive(database, seed, minutes, request_limit, token_limit, largest)
    calls, tokens = fullest_minute(arrivals)
    assert calls <= request_limit
    assert tokens <= token_limit
    # and it is the limit that held it back, not something smaller
    used = max(len(granted) / request_limit / minutes, sum(call.tokens for call in granted) / token_limit / minutes)
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


async def test_a_budget_is_not_reserved_on_an_old_snapshot(budget_db: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.PostgresError, match="READ COMMITTED"):
        async with budget_db.transaction(isolation="repeatable_read"):
            await ask(budget_db, request_limit=1)


# one call after the other


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


# standing in line


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


# what the provider tells


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
