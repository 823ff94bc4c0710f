"""What parses cost that brought nothing: it is recorded once, whoever stopped looking at them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hosted_line import Line, OpenLine

from upload_pipeline.database import queue
from upload_pipeline.errors import ErrorCode


async def settle(line: Line) -> None:
    """What upkeep does, ten minutes and more after the submission."""
    await line.admin.execute("update upload_pipeline.parse_submissions set account_at = now() where account_at > now()")
    hosted = line.context.hosted_parser
    assert hosted is not None
    await hosted.accounts.settle()


async def recorded(line: Line) -> list[tuple[Any, ...]]:
    rows = await line.admin.fetch("select pages, credits, job_id from upload_pipeline.usage_records order by at")
    assert {row["job_id"] for row in rows} <= {line.job.job_id}
    return [(row["pages"], row["credits"]) for row in rows]


async def cost(line: Line) -> Any:
    told = await line.admin.fetchval("select results from upload_pipeline.job_outcomes")
    return told and json.loads(told)["cost"]


async def _snooze_and_cancel(line: Line) -> None:
    assert await line.step() is not None
    await queue.cancel_job(line.context.db, line.job.job_id)


async def _cancel_at_work(line: Line) -> None:
    await queue.cancel_job(line.context.db, line.job.job_id)
    await queue.release_jobs(line.context.db, [line.job.lease])


@pytest.mark.parametrize("stop", [_snooze_and_cancel, _cancel_at_work])
async def test_a_parse_whose_job_was_cancelled_is_recorded_when_it_has_ended(
    open_line: OpenLine, stop: Callable[[Line], Awaitable[None]]
) -> None:
    line = await open_line()
    line.simulator.running = 10**6
    await line.submitted()
    await stop(line)
    polls = line.requests.get("poll", 0)
    await settle(line)
    assert (await recorded(line), line.requests["poll"]) == ([], polls + 1)
    line.simulator.running = 0
    await settle(line)
    assert await recorded(line) == [(4, 12)]
    assert (await cost(line))["pages"] == 4
    # once: it is not asked for again, and a restart of the job does not count it again
    await settle(line)
    assert line.requests["poll"] == polls + 2
    await line.restart()
    await line.step()
    assert line.job.stage == "parsed"
    assert (await recorded(line), line.paid) == ([(4, 12)], 1)


async def test_a_parse_that_was_given_up_for_another_is_recorded_too(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.running = 10**6
    await line.submitted()
    await line.pass_time(3600)
    await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
    await line.restart("job_validated")
    await line.submitted()
    line.simulator.running = 0
    await settle(line)
    assert (await recorded(line), line.paid) == ([(4, 12)], 2)
    await line.step()
    assert line.job.stage == "parsed"
    assert await recorded(line) == [(4, 12), (4, 12)]
    await settle(line)
    assert line.requests["poll"] == 3


async def test_a_job_that_goes_on_is_asked_for_by_nobody_else(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    await settle(line)
    assert "poll" not in line.requests
    await line.step()
    await settle(line)
    assert line.requests["poll"] == 1


@pytest.mark.parametrize("ending", ["FAILED", "CANCELLED"])
async def test_what_a_parse_that_failed_cost_is_told_with_the_failure(open_line: OpenLine, ending: str) -> None:
    line = await open_line()
    line.simulator.bills_failures = True
    line.simulator.end_next(ending)
    await line.submitted()
    assert (await line.fails()).code is ErrorCode.PARSE_FAILED
    assert await recorded(line) == [(0, 12)]
    assert (await cost(line))["usd"] == 0.015
    await settle(line)
    assert await recorded(line) == [(0, 12)]


async def test_a_parse_that_failed_and_costs_nothing_is_not_recorded(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.end_next("FAILED")
    await line.submitted()
    await line.fails()
    await settle(line)
    await settle(line)
    assert (await recorded(line), line.requests["poll"]) == ([], 2)


@pytest.mark.parametrize("why", ["gone", "running", "failing"])
async def test_of_a_parse_that_nothing_is_known_of_an_estimate_is_recorded(open_line: OpenLine, why: str) -> None:
    line = await open_line()
    line.simulator.running = 10**6
    await line.submitted()
    await queue.cancel_job(line.context.db, line.job.job_id)
    await queue.release_jobs(line.context.db, [line.job.lease])
    line.simulator.misbehave("server_error", operation="poll")
    await settle(line)
    assert await recorded(line) == []
    if why == "gone":
        line.simulator.misbehave("gone", operation="poll")
    else:
        await line.pass_time(48 * 3600)
        if why == "failing":
            line.simulator.misbehave("server_error", operation="poll")
    await settle(line)
    assert await recorded(line) == [(1, 3)]
    await settle(line)
    assert line.requests["poll"] == 2


async def test_accounts_wait_for_room_within_the_limits(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    await queue.cancel_job(line.context.db, line.job.job_id)
    await queue.release_jobs(line.context.db, [line.job.lease])
    line.simulator.misbehave("rate_limited", operation="poll")
    await settle(line)
    assert await recorded(line) == []
    await line.admin.execute("update upload_pipeline.provider_budgets set frozen_until = null")
    await settle(line)
    assert await recorded(line) == [(4, 12)]
