"""A document is paid for once, whoever dies, sleeps or starts it again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from hosted_line import (
    PAGES,
    PDF,
    TIMEOUT,
    TTL,
    Crash,
    CrashingDatabase,
    HeldDatabase,
    Line,
    OpenLine,
)

from upload_pipeline.database import parse_submissions, queue
from upload_pipeline.database.queue import Advance
from upload_pipeline.errors import ErrorCode
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.llamaparse_results import PROVIDER
from upload_workers import parse_turns
from upload_workers.hosted_parse import open_hosted_parser


def _file(line: Line) -> Path:
    path = line.context.settings.home / "claim.pdf"
    path.write_bytes(PAGES)
    return path


async def test_a_worker_that_dies_with_the_jobs_id_in_its_hands_leaves_it_to_be_found(open_line: OpenLine) -> None:
    line = await open_line()
    with pytest.raises(Crash):
        await line.step(replace(line.context, db=CrashingDatabase(line.context.db, "commit_submission")))
    assert line.paid == 1
    lost = await line.take_over()
    await line.parsed()
    assert line.requests == {"find": 1, "upload": 1, "submit": 1, "list": 1, "poll": 1}
    assert line.paid == 1
    with pytest.raises(asyncpg.PostgresError) as fenced:
        await parse_submissions.commit_submission(
            line.context.db,
            lost.lease,
            submission_id=uuid4(),
            parse_id="pjb-other",
            keep=True,
            ttl=TTL,
        )
    assert fenced.value.sqlstate == queue.LEASE_LOST


async def test_the_jobs_id_is_stored_though_the_budget_cannot_be_told(open_line: OpenLine) -> None:
    line = await open_line(llamaparse_requests_per_minute=50)  # one budget for all
    held = HeldDatabase(line.context.db, "settle_calls", lambda: line.requests.get("submit", 0) > 0)
    hosted = open_hosted_parser(held, ProviderCalls(), line.context.settings)  # type: ignore[arg-type]
    assert hosted is not None
    async with asyncio.timeout(TIMEOUT):
        assert await line.step(replace(line.context, hosted_parser=hosted)) is None
    assert (await line.row())["parse_id"] is not None
    assert held.waits == 1
    settled = "select count(*) from upload_pipeline.provider_reservations where settled_at is not null"
    assert await line.admin.fetchval(settled) == 2
    held.let_go.set()
    await hosted.close()
    assert await line.admin.fetchval(settled) == 3


async def test_a_look_is_not_held_up_for_long_by_a_budget_that_cannot_be_told(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse_turns, "PATIENCE", 0.2)
    line = await open_line()
    await line.submitted()
    held = HeldDatabase(line.context.db, "settle_calls", lambda: True)
    hosted = open_hosted_parser(held, ProviderCalls(), line.context.settings)  # type: ignore[arg-type]
    assert hosted is not None
    async with asyncio.timeout(TIMEOUT):
        assert await line.step(replace(line.context, hosted_parser=hosted)) is None
    assert line.job.stage == "parsed"
    await hosted.close()


@pytest.mark.parametrize("word", ["finish_submission", "commit_parse"])
async def test_a_worker_that_dies_with_the_result_in_its_hands_leaves_it_to_be_fetched_and_counted_once(
    open_line: OpenLine, word: str
) -> None:
    line = await open_line()
    await line.submitted()
    with pytest.raises(Crash):
        await line.step(replace(line.context, db=CrashingDatabase(line.context.db, word)))
    lost = await line.take_over()
    await line.step()
    assert line.job.stage == "parsed"
    assert line.requests["poll"] == (2 if word == "finish_submission" else 1)
    (used,) = await line.admin.fetch("select * from upload_pipeline.usage_records")
    assert (used["pages"], line.paid) == (4, 1)
    # and the one that died, if it only slept, can write nothing
    held, line.job = line.job, replace(lost, stage="parsing")
    with pytest.raises(asyncpg.PostgresError) as fenced:
        await line.step()
    assert fenced.value.sqlstate == queue.LEASE_LOST
    line.job = held
    await line.step()
    assert line.job.stage == "parse_validated"


@pytest.mark.parametrize("fault", ["dropped", "truncated"])
async def test_an_answer_that_is_lost_is_found_by_the_next_try(open_line: OpenLine, fault: str) -> None:
    line = await open_line()
    line.simulator.misbehave(fault, operation="submit")
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.PARSE_UNAVAILABLE, True)
    await line.claim()
    await line.parsed()
    assert (line.requests["submit"], line.paid) == (1, 1)


async def test_a_call_that_may_have_made_a_job_is_not_repeated_before_it_would_be_listed(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("server_error", operation="submit")
    assert (await line.fails()).code is ErrorCode.PARSE_UNAVAILABLE
    await line.claim()
    delay = await line.step()
    assert delay is not None
    assert TIMEOUT - 2 < delay.total_seconds() < TIMEOUT * 1.2
    assert line.requests == {"find": 1, "upload": 1, "submit": 1, "list": 1}
    await line.claim()
    await line.pass_time(TIMEOUT)
    await line.parsed()
    assert (line.requests["submit"], line.requests["list"], line.paid) == (2, 2, 1)


async def test_nobody_submits_while_a_worker_that_lost_its_lease_may_be_about_to(open_line: OpenLine) -> None:
    """The first has announced its call and is slow; what it sends in the end is within the time that it announced."""
    line = await open_line()
    hosted = line.context.hosted_parser
    assert hosted is not None
    slow = line.job
    file_id = await hosted.client.upload(_file(line), name="claim.pdf", media_type=PDF, external_id=str(line.document))
    db, client = line.context.db, hosted.client
    settle = timedelta(seconds=TIMEOUT)
    begun = await parse_submissions.begin_submission(
        db, slow.lease, provider=PROVIDER, tier=client.tier, version=client.tier_version, settle=settle
    )
    assert await parse_submissions.announce_submission(
        db, slow.lease, begun.submission_id, seconds=timedelta(seconds=TIMEOUT), settle=settle
    )
    await line.take_over()
    delay = await line.step()
    assert delay is not None
    assert delay.total_seconds() > TIMEOUT
    assert "submit" not in line.requests

    # the slow one's call gets through; its lease does not
    made = await client.submit(file_id, document=str(line.document), submission=str(begun.submission_id))
    for write in (
        parse_submissions.commit_submission(
            db, slow.lease, submission_id=begun.submission_id, parse_id=made, keep=True, ttl=TTL
        ),
        parse_submissions.end_submission_call(db, slow.lease, begun.submission_id, made_nothing=True),
        parse_submissions.announce_submission(db, slow.lease, begun.submission_id, seconds=settle, settle=settle),
        parse_submissions.fail_submission(db, slow.lease, begun.submission_id),
    ):
        with pytest.raises(asyncpg.PostgresError) as fenced:
            await write
        assert fenced.value.sqlstate == queue.LEASE_LOST
    await line.claim()
    await line.parsed()
    assert (await line.row())["parse_id"] == made
    assert (line.requests["submit"], line.paid) == (1, 1)


async def test_a_second_call_is_announced_only_when_the_first_is_over(open_line: OpenLine) -> None:
    line = await open_line()
    db, second = line.context.db, timedelta(seconds=1)
    begun = await parse_submissions.begin_submission(
        db, line.job.lease, provider="p", tier="t", version="v", settle=second
    )
    assert (begun.called_at, begun.wait, begun.parse_id, begun.age) == (None, 0, None, None)

    async def announce() -> bool:
        return await parse_submissions.announce_submission(
            db, line.job.lease, begun.submission_id, seconds=second, settle=second
        )

    assert await announce()
    assert not await announce()
    await line.pass_time(1.5)  # over, and not settled
    assert not await announce()
    await line.pass_time(1)
    assert await announce()
    again = await parse_submissions.begin_submission(
        db, line.job.lease, provider="p", tier="t", version="v", settle=second
    )
    assert again.called_at is not None
    assert 1 < again.wait <= 2
    assert again.submission_id == begun.submission_id


async def test_a_parse_that_has_finished_is_never_asked_for_again(open_line: OpenLine) -> None:
    line = await open_line()
    await line.parsed()
    first, output = await line.row(), line.requests
    # nothing is kept there any more, and it would fail if it were asked
    line.simulator._jobs.clear()
    line.simulator._files.clear()
    for stage in ("queued", "job_validated", "parsing", "parsed"):
        await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
        await line.restart(stage)
        if stage == "queued":
            assert (await line.row())["parse_id"] is None
            await queue.advance_jobs(
                line.context.db, [Advance(line.job.lease, "queued", "job_validated", True)], ttl=TTL
            )
            line.job = replace(line.job, stage="job_validated")
        while line.job.stage != "parse_validated":
            assert await line.step() is None
        row = await line.row()
        assert (row["parse_id"], row["page_count"]) == (first["parse_id"], 4)
    assert line.requests == output
    assert await line.admin.fetchval("select count(*) from upload_pipeline.usage_records") == 1


async def test_another_tier_is_paid_for_once_and_the_first_is_still_there(open_line: OpenLine) -> None:
    line = await open_line()
    await line.parsed()
    first = (await line.row())["parse_id"]
    parsers = []
    for tier, version in (("agentic", "2026-10-16"), ("cost_effective", "2026-09-28"), ("agentic", "2026-10-16")):
        line.use(llamaparse_tier=tier, llamaparse_version=version)
        await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
        await line.restart("job_validated")
        await line.parsed()
        parsers.append((await line.row())["parser"])
        assert line.context.hosted_parser is not None
        await line.context.hosted_parser.close()
    assert parsers == ["llamaparse@agentic/2026-10-16", "llamaparse@cost_effective/2026-09-28", parsers[0]]
    assert (line.paid, line.requests["submit"], line.requests["poll"]) == (2, 2, 2)
    # of the first, nothing is asked, and its output stands where it stood
    assert first in {row["parse_id"] for row in await line.submissions()}


async def test_a_job_that_may_exist_unseen_is_looked_for_under_another_setting_too(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("dropped", operation="submit")
    await line.fails()
    line.use(llamaparse_tier="agentic")
    await line.claim()
    await line.parsed()
    assert (await line.row())["parse_tier"] == "cost_effective"
    assert (line.requests["submit"], line.paid) == (1, 1)
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


async def test_where_it_does_not_exist_the_new_setting_holds(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("server_error", operation="submit")
    await line.fails()
    line.use(llamaparse_tier="agentic")
    await line.claim()
    await line.pass_time(2 * TIMEOUT)
    await line.parsed()
    assert (await line.row())["parse_tier"] == "agentic"
    assert line.paid == 1
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


async def test_a_job_in_flight_goes_on_when_the_parser_is_another_by_then(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    line.use(parser="local")
    await line.step()
    assert line.job.stage == "parsed"
    assert (await line.row())["parser"].startswith("llamaparse@")
    # started again from the start, it is parsed here
    await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
    await line.restart("job_validated")
    await line.step()
    assert (await line.row())["parse_id"] is None
    assert line.paid == 1
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()
