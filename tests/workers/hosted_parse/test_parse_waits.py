"""Parses that take too long, and the hints of the webhook."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest
from hosted_line import (
    TTL,
    OpenLine,
)

from upload_pipeline.database import parse_submissions, queue
from upload_pipeline.errors import ErrorCode
from upload_pipeline.providers.llamaparse_results import PROVIDER
from upload_pipeline.settings import load_settings


async def test_a_parse_that_takes_too_long_is_told_looked_at_again_and_given_up_on_demand(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.running = 10**6
    await line.submitted()
    await line.pass_time(3600)
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.PARSE_TIMEOUT, True)
    assert "UPLOAD_PIPELINE_LLAMAPARSE_PARSE_TIMEOUT" in error.message
    # a retry looks again
    await line.claim()
    assert (await line.fails()).code is ErrorCode.PARSE_TIMEOUT
    await line.claim()
    line.simulator.misbehave("server_error", operation="poll")
    assert "cannot be looked at" in (await line.fails()).message
    assert line.requests["submit"] == 1
    # and one from an earlier stage looks once more, and submits anew
    await line.claim()
    assert (await line.fails()).code is ErrorCode.PARSE_TIMEOUT
    await line.restart("job_validated")
    await line.submitted()
    assert line.requests["submit"] == 2
    line.simulator.running = 0
    await line.step()
    assert line.job.stage == "parsed"


async def test_a_parse_that_ended_after_the_limit_is_taken_all_the_same(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    await line.pass_time(3600)
    await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
    await line.restart("job_validated")
    await line.parsed()
    assert (line.requests["submit"], line.paid) == (1, 1)


@pytest.mark.parametrize("stage", ["job_validated", "parsing"])
@pytest.mark.parametrize("whose", ["theirs", "ours"])
async def test_a_document_that_finds_no_room_within_the_limits_is_told_in_the_end(
    open_line: OpenLine, stage: str, whose: str
) -> None:
    line = await open_line(llamaparse_wait_timeout=7200.0)
    if stage == "parsing":
        await line.submitted()
    if whose == "ours":
        await line.admin.execute("delete from upload_pipeline.provider_reservations")
        line.use(llamaparse_requests_per_minute=1)
        await line.use_up()
    line.simulator.retry_after = 30
    for waited in (0, 7100):
        line.simulator.misbehave("rate_limited")
        await line.pass_time(waited)
        assert await line.step() is not None
        await line.claim()
    assert await line.retries() == 0
    line.simulator.misbehave("rate_limited")
    await line.pass_time(200)
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.PARSE_TIMEOUT, True)
    assert "UPLOAD_PIPELINE_LLAMAPARSE_WAIT_TIMEOUT" in error.message
    assert await line.retries() == 1
    # a restart may wait as long again
    await line.claim()
    await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
    await line.restart()
    assert await line.step() is not None
    assert line.paid == (stage == "parsing")
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


@pytest.mark.parametrize("stage", ["job_validated", "parsing"])
async def test_no_document_is_told_to_have_waited_too_long_while_the_provider_is_paused(
    open_line: OpenLine, stage: str
) -> None:
    line = await open_line(llamaparse_wait_timeout=7200.0)
    if stage == "parsing":
        await line.submitted()
    line.simulator.misbehave("quota")
    for _ in range(2):
        # the one that meets the empty account, and one that finds the provider paused
        assert await line.step() is not None
        await line.claim()
        await line.pass_time(10_000)
    # it is over, and all who waited come back at once: they have as long as they had
    await line.admin.execute(
        "update upload_pipeline.provider_budgets set frozen_until = now(), paused_until = now() - interval '1 h'"
    )
    line.simulator.misbehave("rate_limited")
    assert await line.step() is not None
    await line.claim()
    await line.admin.execute(
        "update upload_pipeline.provider_budgets set frozen_until = now(), paused_until = now() - interval '2 h'"
    )
    line.simulator.misbehave("rate_limited")
    assert (await line.fails()).code is ErrorCode.PARSE_TIMEOUT


async def test_a_worker_without_the_key_leaves_a_parse_to_those_that_have_it(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    keyless = replace(line.context, hosted_parser=None)
    for seconds in (0, 90, 3600):
        await line.pass_time(seconds)
        delay = await line.step(keyless)
        assert delay is not None
        assert delay.total_seconds() == pytest.approx({0: 5, 90: 50, 3600: 60}[seconds], abs=3)
        await line.claim()
    assert await line.retries() == 0
    await line.step()
    assert (line.job.stage, line.paid) == ("parsed", 1)


async def test_where_nobody_has_the_key_of_a_parse_that_is_told(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    line.context, able = replace(line.context, hosted_parser=None), line.context
    await line.pass_time(3600)
    await line.admin.execute("update upload_pipeline.provider_budgets set answered_at = now() - interval '59 min'")
    assert await line.step() is not None
    await line.claim()
    await line.admin.execute("update upload_pipeline.provider_budgets set answered_at = now() - interval '1 h'")
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.SETTING_INVALID, False)
    assert "UPLOAD_PIPELINE_LLAMAPARSE_API_KEY" in error.message
    # it is given to a fleet that has the key again
    await line.restart()
    assert await line.step() is not None
    await line.claim()
    line.context = able
    await line.step()
    assert (line.job.stage, line.paid) == ("parsed", 1)


async def test_a_hint_wakes_the_job_that_waits_and_no_other(open_line: OpenLine) -> None:
    line = await open_line()
    db = line.context.db

    async def wake(parse_id: str) -> int:
        return await parse_submissions.wake_parse(db, provider=PROVIDER, parse_id=parse_id)

    await line.step()
    parse_id = (await line.row())["parse_id"]
    line.simulator.running = 10**6
    await line.step()
    assert "poll" not in line.requests
    assert await wake("pjb-unknown") == 0
    assert await parse_submissions.wake_parse(db, provider="another", parse_id=parse_id) == 0
    assert await wake(parse_id) == 1
    assert await line.admin.fetchval("select state from upload_pipeline.upload_jobs") == "queued"
    assert await wake(parse_id) == 0
    (line.job,) = await queue.claim_jobs(db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL)
    # at work: the snooze that follows is due at once
    assert await wake(parse_id) == 1
    await line.step()
    assert line.requests["poll"] == 1
    assert await queue.promote_due(db) == 1
    await line.claim()
    line.simulator.running = 0
    await line.step()
    assert line.job.stage == "parsed"
    assert await wake(parse_id) == 0


@pytest.mark.parametrize("what", ["FAILED", "CANCELLED", "gone", "no page", "failed pages", "rejected"])
async def test_a_hint_during_the_look_that_finds_the_end_does_not_undo_it(open_line: OpenLine, what: str) -> None:
    line = await open_line(llamaparse_failed_pages="fail")
    if what in ("FAILED", "CANCELLED"):
        line.simulator.end_next(what)
    elif what in ("no page", "failed pages"):
        line.simulator.end_next(failed_pages=(1, 2, 3, 4) if what == "no page" else (1,))
    await line.submitted()
    if what in ("gone", "rejected"):
        line.simulator.misbehave(what, operation="poll")
    parse_id = (await line.row())["parse_id"]
    assert await parse_submissions.wake_parse(line.context.db, provider=PROVIDER, parse_id=parse_id) == 1
    error = await line.fails()
    job = await line.admin.fetchrow("select state, retry_count from upload_pipeline.upload_jobs")
    assert tuple(job) == ("deadletter", 0)
    assert await line.admin.fetchval("select error_code from upload_pipeline.job_outcomes") == error.code
    # and nothing is submitted that nobody asked for
    await line.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where state = 'retryable'")
    assert await queue.promote_due(line.context.db) == 0
    assert len(await line.submissions()) == 1


async def test_a_hint_shortens_the_wait_for_a_retry_and_the_retry_counts(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.running = 10**6
    await line.submitted()
    await line.pass_time(3600)
    parse_id = (await line.row())["parse_id"]
    for retries in (1, 2, 3):
        assert await parse_submissions.wake_parse(line.context.db, provider=PROVIDER, parse_id=parse_id) == 1
        assert (await line.fails()).code is ErrorCode.PARSE_TIMEOUT
        assert await line.retries() == retries
        assert await line.admin.fetchval("select error_code from upload_pipeline.job_outcomes") == "PARSE_TIMEOUT"
        assert await queue.promote_due(line.context.db) == 1
        await line.claim()
    assert await parse_submissions.wake_parse(line.context.db, provider=PROVIDER, parse_id=parse_id) == 1
    await line.fails()
    assert await line.admin.fetchval("select state from upload_pipeline.upload_jobs") == "deadletter"


async def test_the_address_for_messages_goes_along_where_there_is_a_secret(open_line: OpenLine) -> None:
    line = await open_line()
    line.use(api_public_url="https://files.example.com/")
    assert line.context.hosted_parser is not None
    assert not line.context.hosted_parser.client.told
    await line.context.hosted_parser.close()
    secret = load_settings(llamaparse_webhook_secret="s" * 32).llamaparse_webhook_secret
    line.use(llamaparse_webhook_secret=secret)
    await line.step()
    (made,) = line.simulator._jobs.values()
    (hook,) = made.body["webhook_configurations"]
    assert hook["webhook_url"] == "https://files.example.com/api/v2/webhooks/llamaparse"
    assert (hook["webhook_signing_secret"], hook["webhook_output_format"]) == ("s" * 32, "json")
    await line.context.hosted_parser.close()
