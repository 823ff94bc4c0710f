"""Jobs are put off, fail and go on as the answers of LlamaParse ask for."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest
from hosted_line import (
    USER,
    OpenLine,
)

from tests.simulators.llama_cloud import KEY
from upload_pipeline.errors import ErrorCode


async def test_a_limit_puts_the_job_off_as_long_as_it_says_and_freezes_the_others(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.retry_after = 40
    line.simulator.misbehave("rate_limited", operation="submit")
    delay = await line.step()
    assert delay is not None
    assert 40 <= delay.total_seconds() <= 44
    asked = line.requests
    other = await open_line(user=uuid4())
    delay = await other.step()
    assert delay is not None
    assert 30 < delay.total_seconds() <= 44
    assert line.requests == asked
    assert await line.admin.fetchval("select max(retry_count) from upload_pipeline.upload_jobs") == 0
    # the refused call made nothing: no look is needed
    await line.admin.execute("update upload_pipeline.provider_budgets set frozen_until = null")
    hosted = line.context.hosted_parser
    assert hosted is not None
    await line.admin.execute("delete from upload_pipeline.upload_jobs where user_id <> $1", USER)
    await line.claim()
    await line.parsed()
    assert (line.requests.get("list", 0), line.paid) == (0, 1)


@pytest.mark.parametrize(
    ("operation", "fault", "code"),
    [
        ("find", "unauthorised", "PARSE_DENIED"),
        ("upload", "quota", "PARSE_QUOTA"),
        ("submit", "quota", "PARSE_QUOTA"),
        ("poll", "unauthorised", "PARSE_DENIED"),
    ],
)
async def test_an_empty_account_pauses_everybody_with_one_alarm_and_goes_on_later(
    open_line: OpenLine, operation: str, fault: str, code: str
) -> None:
    line = await open_line()
    line.simulator.misbehave(fault, operation=operation)
    if operation == "poll":
        await line.submitted()
    delay = await line.step()
    assert delay is not None
    assert 600 <= delay.total_seconds() <= 660
    asked = line.requests
    await line.claim()
    delay = await line.step()
    assert delay is not None
    assert delay.total_seconds() > 500
    assert line.requests == asked
    alarms = await line.admin.fetch("select * from upload_pipeline.events where code = 'provider_paused'")
    assert [(json.loads(alarm["payload"])["code"], alarm["severity"]) for alarm in alarms] == [(code, "error")]
    assert KEY not in alarms[0]["payload"]
    assert await line.retries() == 0

    await line.admin.execute("update upload_pipeline.provider_budgets set frozen_until = null")
    await line.claim()
    if operation != "poll":
        await line.submitted()
    await line.step()
    assert line.job.stage == "parsed"
    assert line.paid == 1


async def test_a_file_that_is_refused_fails_at_once_and_may_be_sent_again(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("rejected", operation="submit")
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.PARSE_REJECTED, False)
    await line.restart()
    await line.parsed()
    assert (line.requests.get("list", 0), line.paid) == (0, 1)


@pytest.mark.parametrize("operation", ["find", "upload"])
async def test_a_server_in_trouble_before_the_submission_is_tried_again(open_line: OpenLine, operation: str) -> None:
    line = await open_line()
    line.simulator.misbehave("server_error", operation=operation)
    assert (await line.fails()).code is ErrorCode.PARSE_UNAVAILABLE
    assert await line.retries() == 1
    await line.claim()
    await line.parsed()
    assert line.paid == 1


@pytest.mark.parametrize("fault", ["server_error", "dropped"])
async def test_a_look_that_fails_costs_no_retry(open_line: OpenLine, fault: str) -> None:
    line = await open_line()
    await line.submitted()
    line.simulator.misbehave(fault, operation="poll")
    assert await line.step() is not None
    await line.claim()
    assert await line.retries() == 0
    assert await line.step() is None
    assert line.job.stage == "parsed"


async def test_failed_pages_are_named_in_the_documents_warnings(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.end_next(failed_pages=(2, 3))
    await line.parsed()
    row = await line.row()
    assert (row["warnings"], row["page_count"]) == (["LlamaParse could not read pages 2 to 3 of 4."], 4)


async def test_failed_pages_fail_the_document_where_that_is_asked_for_and_a_change_of_mind_is_free(
    open_line: OpenLine,
) -> None:
    line = await open_line(llamaparse_failed_pages="fail")
    line.simulator.end_next(failed_pages=(1,))
    await line.submitted()
    error = await line.fails()
    assert (error.code, error.details["failed_pages"]) == (ErrorCode.PARSE_FAILED, [1])
    assert "UPLOAD_PIPELINE_LLAMAPARSE_FAILED_PAGES" in error.message
    assert await line.admin.fetchval("select credits from upload_pipeline.usage_records") == 12
    cost = await line.admin.fetchval("select results from upload_pipeline.job_outcomes")
    assert json.loads(cost)["cost"]["pages"] == 4
    line.use(llamaparse_failed_pages="warn")
    await line.restart()
    await line.step()
    assert (await line.row())["warnings"] == ["LlamaParse could not read page 1 of 4."]
    assert (line.paid, line.requests["poll"]) == (1, 1)
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


@pytest.mark.parametrize(
    ("what", "stage"),
    [("FAILED", None), ("FAILED", "job_validated"), ("CANCELLED", None), ("gone", "job_validated"), ("no page", None)],
)
async def test_what_failed_is_told_and_submitted_anew_when_it_is_started_again(
    open_line: OpenLine, what: str, stage: str | None
) -> None:
    line = await open_line()
    if what == "no page":
        line.simulator.end_next(failed_pages=(1, 2, 3, 4))
    elif what != "gone":
        line.simulator.end_next(what)
    await line.submitted()
    failed = (await line.row())["parse_id"]
    if what == "gone":
        line.simulator.misbehave("gone", operation="poll")
    error = await line.fails()
    assert (error.code, error.retryable, error.details["parse_id"]) == (ErrorCode.PARSE_FAILED, False, failed)
    await line.restart(stage)
    if stage is None:
        assert await line.step() is not None
        await line.claim()
        await line.pass_time(10)
        await line.step()
    else:
        await line.parsed()
    assert line.job.stage == "parsed"
    assert (await line.row())["parse_id"] != failed
    assert line.requests["submit"] == 2
    first, second = await line.submissions()
    assert first["failed_at"] is not None
    assert second["finished_at"] is not None


async def test_a_failed_parse_is_not_submitted_by_who_does_not_submit(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.end_next("FAILED")
    await line.submitted()
    await line.fails()
    line.use(parser="local")
    await line.restart()
    error = await line.fails()
    assert error.code is ErrorCode.PARSE_FAILED
    assert "job_validated" in error.message
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()
