"""What LlamaParse allows in a few seconds, and how long it keeps a file: documents wait, and nothing is paid twice."""

from __future__ import annotations

import asyncio

import pytest
from hosted_line import OpenLine

from upload_pipeline.errors import ErrorCode


@pytest.mark.parametrize("kind", ["upload", "submit"])
async def test_a_window_that_is_full_puts_the_job_off_and_counts_no_retry(open_line: OpenLine, kind: str) -> None:
    line = await open_line()
    window = line.simulator._windows[kind]
    window.seconds = 1.0
    window.take(window.limit)
    delay = await line.step()
    assert delay is not None
    assert 0.9 < delay.total_seconds() < 1.5
    job = await line.admin.fetchrow("select state::text as state, retry_count from upload_pipeline.upload_jobs")
    assert tuple(job) == ("retryable", 0)
    await asyncio.sleep(1.1)
    await line.claim()
    await line.parsed()
    assert line.simulator.books.over_window == {kind: 1}
    assert (line.requests[kind], line.requests["upload"], line.paid) == (2, 2 if kind == "upload" else 1, 1)


@pytest.mark.parametrize("listed", [False, True])
async def test_a_file_whose_time_was_over_before_it_was_submitted_is_uploaded_anew(
    open_line: OpenLine, listed: bool
) -> None:
    line = await open_line()
    line.simulator.expired_listed = listed
    line.simulator.misbehave("server_error", operation="submit")
    assert (await line.fails()).code is ErrorCode.PARSE_UNAVAILABLE
    for file in line.simulator._files.values():
        file.made -= line.simulator.file_life
    await line.pass_time(60)
    await line.claim()
    await line.parsed()
    assert (line.requests["upload"], line.requests["submit"], line.paid) == (2, 2, 1)


async def test_a_call_that_hangs_when_its_job_was_made_is_found_and_paid_for_once(open_line: OpenLine) -> None:
    line = await open_line(llamaparse_timeout=0.5)
    line.simulator.misbehave("stalled", operation="submit")
    assert (await line.fails()).code is ErrorCode.PARSE_UNAVAILABLE
    await line.claim()
    await line.parsed()
    assert (line.requests["submit"], line.paid, line.simulator.books.lost.total()) == (1, 1, 1)
