"""What LlamaParse allows in a few seconds, and how long it keeps a file: documents wait, and nothing is paid twice."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest
from hosted_line import PAGES, PDF, OpenLine

from upload_pipeline.database import provider_budget
from upload_pipeline.errors import ErrorCode
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.llamaparse_results import PROVIDER
from upload_workers import parse_turns
from upload_workers.hosted_parse import HostedParser, open_hosted_parser
from upload_workers.parse_turns import BUDGET, SHORT_LIMITS, Limit, NoRoom


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


@pytest.mark.parametrize("kind", ["upload", "submit"])
async def test_no_request_is_more_than_a_few_seconds_hold_whoever_makes_it(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Ours is a budget of its own, so that the minute need not be smaller; no 429 is met."""
    line = await open_line(llamaparse_requests_per_minute=0)
    window = line.simulator._windows[kind]
    window.limit, window.seconds = 4, 1.0
    monkeypatch.setitem(SHORT_LIMITS, kind, Limit(f"{kind} tried", 4, timedelta(seconds=1)))
    workers = [open_hosted_parser(line.context.db, ProviderCalls(), line.context.settings) for _ in range(4)]
    path = tmp_path / "a.pdf"
    path.write_bytes(PAGES)
    file = await workers[0].client.upload(path, name="a.pdf", media_type=PDF, external_id="a")

    async def work(number: int, hosted: HostedParser) -> None:
        for turn in range(3):
            name = f"{number}-{turn}"
            if kind == "submit":
                await hosted.client.submit(file, document=name, submission=name)
            else:
                await hosted.client.upload(path, name="a.pdf", media_type=PDF, external_id=name)

    try:
        await asyncio.gather(*(work(number, hosted) for number, hosted in enumerate(workers)))
    finally:
        for hosted in workers:
            await hosted.close()
    books = line.simulator.books
    assert (books.over_window.total(), books.over_limit) == (0, 0)
    assert books.requests[kind] == 12 + (kind == "upload")
    assert window.most == 4  # the limit held them back, and nothing smaller


async def test_a_request_that_a_few_seconds_do_not_hold_takes_nothing_of_the_minute(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch, admin: asyncpg.Connection
) -> None:
    monkeypatch.setattr(parse_turns, "PATIENCE", 0.1)
    monkeypatch.setitem(SHORT_LIMITS, "submit", Limit("full", 1, timedelta(seconds=30)))
    line = await open_line()
    hosted = line.context.hosted_parser
    assert hosted is not None
    async with hosted.turns("submit", 5.0):
        pass
    with pytest.raises(NoRoom) as caught:
        async with hosted.turns("submit", 5.0):
            pytest.fail("it is not made")
    assert caught.value.seconds > 20
    await hosted.turns.close()
    counted = await admin.fetch("select model, calls from upload_pipeline.provider_budgets order by model")
    assert [tuple(row) for row in counted] == [("full", 1), (BUDGET, 1)]


async def test_a_request_that_the_minute_does_not_hold_takes_nothing_of_a_few_seconds(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch, admin: asyncpg.Connection
) -> None:
    """The minute, which a 429 freezes, is asked last."""
    monkeypatch.setattr(parse_turns, "PATIENCE", 0.1)
    line = await open_line(llamaparse_requests_per_minute=51)
    hosted = line.context.hosted_parser
    assert hosted is not None
    await line.use_up()
    with pytest.raises(NoRoom):
        async with hosted.turns("upload", 5.0):
            pytest.fail("it is not made")
    counted = await admin.fetch("select model, calls from upload_pipeline.provider_budgets order by model")
    assert [tuple(row) for row in counted] == [(BUDGET, 51), (SHORT_LIMITS["upload"].budget, 0)]


async def test_a_refusal_that_comes_while_a_few_seconds_are_waited_for_is_kept(
    open_line: OpenLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHORT_LIMITS, "submit", Limit("busy", 1, timedelta(seconds=1)))
    line = await open_line()
    hosted = line.context.hosted_parser
    assert hosted is not None
    async with hosted.turns("submit", 5.0):
        pass
    await hosted.turns.close()

    async def submit() -> None:
        async with hosted.turns("submit", 5.0):
            pytest.fail("it is not made")

    waiting = asyncio.create_task(submit())
    await asyncio.sleep(0.3)
    await provider_budget.freeze(
        line.context.db, provider=PROVIDER, key_id=hosted.turns.key_id, model=BUDGET, seconds=60
    )
    with pytest.raises(NoRoom) as caught:
        await waiting
    assert caught.value.seconds > 50


async def test_where_no_minute_holds_more_than_a_few_seconds_do_these_are_not_asked(
    open_line: OpenLine, admin: asyncpg.Connection
) -> None:
    line = await open_line(llamaparse_requests_per_minute=50)
    await line.parsed()
    assert await admin.fetchval("select count(*) from upload_pipeline.provider_budgets") == 1


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
