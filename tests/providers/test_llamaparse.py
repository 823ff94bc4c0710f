"""LlamaParse against the simulator: what it gives, each fault by itself, and what the books say was paid."""

from __future__ import annotations

import asyncio
import importlib.machinery
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator
from tests.simulators.llama_cloud_books import StoredFile
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.llamaparse import LlamaParse
from upload_pipeline.providers.llamaparse_results import FinishedParse, ParseError, Remedy, warnings_of

AROUND = {"since": datetime.now(UTC) - timedelta(hours=1), "before": datetime.now(UTC) + timedelta(hours=1)}
TIER = {"tier": "cost_effective", "version": "2026-09-28"}


@pytest.fixture
async def simulator() -> AsyncIterator[LlamaCloudSimulator]:
    async with LlamaCloudSimulator(uploads_per_5_s=1000, parses_per_10_s=1000) as simulator:
        yield simulator


@pytest.fixture
async def parser(simulator: LlamaCloudSimulator) -> AsyncIterator[LlamaParse]:
    parser = LlamaParse(api_key=KEY, base_url=simulator.url, timeout=5.0, **TIER)
    yield parser
    await parser.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ftwo\fthree\ffour")
    return path


async def upload(parser: LlamaParse, path: Path, external_id: str = "d1") -> str:
    found = await parser.find_file(external_id)
    return found or await parser.upload(path, name="d1.txt", media_type="text/plain", external_id=external_id)


async def submit(parser: LlamaParse, path: Path, submission: str = "s1") -> str:
    """Finds the job, or makes it: as a worker does that knows of an earlier call."""
    file_id = await upload(parser, path)
    made = await parser.find_submission(submission, **AROUND)
    return made or await parser.submit(file_id, document="d1", submission=submission)


def warnings(done: FinishedParse, taken: Any = "warn") -> tuple[str, ...]:
    return warnings_of("pjb-1", page_count=done.page_count, failed_pages=done.failed_pages, taken=taken)


async def finished(parser: LlamaParse, path: Path) -> FinishedParse:
    done = await parser.look(await submit(parser, path))
    assert done is not None
    return done


# what it gives


async def test_pages_are_separated_by_form_feeds(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    done = await finished(parser, path)
    assert (done.markdown, done.page_count) == ("one\ftwo\fthree\ffour", 4)
    assert (warnings(done), done.failed_pages, done.credits) == ((), (), 12)
    assert simulator.books.paid == {"d1": 1}


@pytest.mark.parametrize("told", [None, -1, float("nan"), float("inf"), "much", [12]])
async def test_a_price_that_is_none_counts_as_not_told_and_the_pages_are_there(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path, told: Any
) -> None:
    parse_id = await submit(parser, path)
    simulator._jobs[parse_id].cost = told
    done = await parser.look(parse_id)
    assert done is not None
    assert (done.page_count, done.credits) == (4, None)


async def test_a_job_at_work_brings_nothing_yet(simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path) -> None:
    simulator.pending = 3600
    parse_id = await submit(parser, path)
    assert await parser.look(parse_id) is None
    simulator.pending, simulator.running = 0, 3600
    assert await parser.look(parse_id) is None
    simulator.running = 0
    assert await parser.look(parse_id) is not None


async def test_a_second_call_uploads_nothing_and_pays_nothing(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    assert await upload(parser, path) == await upload(parser, path)
    assert await submit(parser, path) == await submit(parser, path)
    assert (simulator.books.uploads, simulator.books.paid) == ({"d1": 1}, {"d1": 1})


async def test_another_submission_is_another_job(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    assert await submit(parser, path, "s1") != await submit(parser, path, "s2")
    assert simulator.books.paid == {"d1": 2}


async def test_a_job_is_found_behind_many_others(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    made = await submit(parser, path)
    file_id = await upload(parser, path)
    for number in range(120):
        await parser._client.parsing.create(  # without the search of each submit
            file_id=file_id, **TIER, user_metadata={"document": "d1", "submission": f"other{number}"}
        )
    assert await parser.find_submission("s1", **AROUND) == made
    assert await parser.find_submission("s2", **AROUND) is None
    now = datetime.now(UTC)
    assert await parser.find_submission("s1", since=AROUND["since"], before=now - timedelta(minutes=5)) is None
    assert await parser.find_submission("s1", since=now + timedelta(minutes=5), before=AROUND["before"]) is None


async def test_what_is_announced_at_the_last_moment_can_stop_the_call(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    file_id = await upload(parser, path)

    async def refuse(seconds: float) -> None:
        assert seconds == 5.0
        raise LookupError

    with pytest.raises(LookupError):
        await parser.submit(file_id, document="d1", submission="s1", announce=refuse)

    async def dawdle(seconds: float) -> None:
        await asyncio.sleep(seconds * 2)

    slow = LlamaParse(api_key=KEY, base_url=simulator.url, timeout=0.1, **TIER)
    with pytest.raises(ParseError, match="did not answer"):
        await slow.submit(file_id, document="d1", submission="s1", announce=dawdle)
    await slow.close()
    assert simulator.books.requests["submit"] == 0


@pytest.mark.parametrize("listed", [False, True])
async def test_a_file_that_is_about_to_expire_or_has_is_not_found(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path, listed: bool
) -> None:
    simulator.expired_listed = listed
    file_id = await upload(parser, path)
    for simulator.file_life in (0.0, 300.0):
        assert await parser.find_file("d1") is None
    simulator.file_life = 3600.0
    assert await parser.find_file("d1") == file_id


@pytest.mark.parametrize(("minutes", "found"), [(5, None), (60, "dfl-1")])
async def test_a_time_without_a_zone_is_taken_for_utc(
    simulator: LlamaCloudSimulator, parser: LlamaParse, minutes: int, found: str | None
) -> None:
    class Expiring(StoredFile):
        def as_json(self, expires_at: datetime) -> dict[str, Any]:
            at = (datetime.now(UTC) + timedelta(minutes=minutes)).replace(tzinfo=None)
            return {**super().as_json(expires_at), "expires_at": at.isoformat()}

    simulator._files["dfl-1"] = Expiring("dfl-1", "d1.txt", "d1", b"one", simulator.clock())
    assert await parser.find_file("d1") == found


async def test_a_job_that_is_told_within_another_object_is_read_too(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = await upload(parser, path)
    flat = simulator._job_json
    monkeypatch.setattr(simulator, "_job_json", lambda job: {"job": flat(job)})
    made = await parser.submit(file_id, document="d1", submission="s1")
    assert made in simulator._jobs


async def test_a_submission_of_a_file_that_is_gone_may_be_tried_again(parser: LlamaParse) -> None:
    with pytest.raises(ParseError) as caught:
        await parser.submit("dfl-gone", document="d1", submission="s1")
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.PARSE_UNAVAILABLE, Remedy.AGAIN)


# failed pages and jobs


async def test_failed_pages_are_named_and_keep_their_place(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    simulator.end_next(failed_pages=(2, 3))
    done = await finished(parser, path)
    assert (done.markdown, done.page_count) == ("one\f\f\ffour", 4)
    assert done.failed_pages == (2, 3)
    assert warnings(done) == ("LlamaParse could not read pages 2 to 3 of 4.",)


async def test_one_failed_page_is_told_in_the_singular(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    simulator.end_next(failed_pages=(4,))
    assert warnings(await finished(parser, path)) == ("LlamaParse could not read page 4 of 4.",)


async def test_failed_pages_fail_the_file_where_that_is_asked_for(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    simulator.end_next(failed_pages=(2, 4))
    done = await finished(parser, path)
    with pytest.raises(ParseError) as caught:
        warnings(done, "fail")
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.PARSE_FAILED, Remedy.NEVER)
    assert caught.value.details["failed_pages"] == [2, 4]
    assert "pages 2, 4 of 4" in caught.value.message


@pytest.mark.parametrize("taken", ["warn", "fail"])
async def test_a_file_without_one_good_page_has_failed(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path, taken: str
) -> None:
    simulator.end_next(failed_pages=(1, 2, 3, 4))
    done = await finished(parser, path)
    assert done.credits == 12
    with pytest.raises(ParseError) as caught:
        warnings(done, taken)
    assert caught.value.code is ErrorCode.PARSE_FAILED


@pytest.mark.parametrize("ending", ["FAILED", "CANCELLED"])
async def test_a_job_that_fails_is_told_as_such(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path, ending: str
) -> None:
    simulator.end_next(ending)
    parse_id = await submit(parser, path)
    with pytest.raises(ParseError) as caught:
        await parser.look(parse_id)
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.PARSE_FAILED, Remedy.NEVER)
    assert caught.value.details == {"parse_id": parse_id, "status": ending}
    assert not caught.value.retryable


async def test_a_job_that_is_no_longer_kept_is_told_as_such(
    simulator: LlamaCloudSimulator, parser: LlamaParse, path: Path
) -> None:
    parse_id = await submit(parser, path)
    simulator.misbehave("gone", operation="poll")
    with pytest.raises(ParseError, match="no longer kept") as caught:
        await parser.look(parse_id)
    assert caught.value.code is ErrorCode.PARSE_FAILED


# refusals and outages


@pytest.mark.parametrize("operation", ["find", "upload", "list", "submit", "poll"])
@pytest.mark.parametrize(
    ("fault", "code", "remedy", "retry_after"),
    [
        ("rate_limited", ErrorCode.PARSE_UNAVAILABLE, Remedy.WAIT, 7),
        ("rate_limited_silent", ErrorCode.PARSE_UNAVAILABLE, Remedy.WAIT, None),
        ("quota", ErrorCode.PARSE_QUOTA, Remedy.PAUSE, None),
        ("unauthorised", ErrorCode.PARSE_DENIED, Remedy.PAUSE, None),
        ("rejected", ErrorCode.PARSE_REJECTED, Remedy.NEVER, None),
        ("server_error", ErrorCode.PARSE_UNAVAILABLE, Remedy.AGAIN, None),
        ("dropped", ErrorCode.PARSE_UNAVAILABLE, Remedy.AGAIN, None),
        ("truncated", ErrorCode.PARSE_UNAVAILABLE, Remedy.AGAIN, None),
    ],
)
async def test_each_fault_has_its_code_is_asked_once_and_healed_without_paying_twice(
    simulator: LlamaCloudSimulator,
    parser: LlamaParse,
    path: Path,
    operation: str,
    fault: str,
    code: ErrorCode,
    remedy: Remedy,
    retry_after: float | None,
) -> None:
    simulator.retry_after = 7
    simulator.misbehave(fault, operation=operation)
    with pytest.raises(ParseError) as caught:
        await finished(parser, path)
    error = caught.value
    assert (error.code, error.remedy, error.retry_after) == (code, remedy, retry_after)
    assert error.retryable == (remedy is not Remedy.NEVER)
    assert KEY not in str(error)
    assert simulator.books.requests[operation] == 1
    assert (await finished(parser, path)).page_count == 4
    assert (simulator.books.uploads, simulator.books.paid_again()) == ({"d1": 1}, {})


async def test_what_hangs_is_given_up_in_time(simulator: LlamaCloudSimulator, path: Path) -> None:
    parser = LlamaParse(api_key=KEY, base_url=simulator.url, timeout=0.3, **TIER)
    simulator.misbehave("hang", operation="submit")
    began = time.monotonic()
    with pytest.raises(ParseError, match=r"did not answer within 0\.3 s") as caught:
        await finished(parser, path)
    assert time.monotonic() - began < 30
    assert (caught.value.code, caught.value.remedy) == (ErrorCode.PARSE_UNAVAILABLE, Remedy.AGAIN)
    await parser.close()


async def test_a_server_that_is_away_is_named() -> None:
    parser = LlamaParse(api_key=KEY, base_url="http://127.0.0.1:9", **TIER)
    with pytest.raises(ParseError, match=r"127\.0\.0\.1:9") as caught:
        await parser.look("pjb-1")
    assert caught.value.code is ErrorCode.PARSE_UNAVAILABLE
    await parser.close()


async def test_an_address_that_is_another_servers_is_a_matter_of_settings(path: Path) -> None:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    parser = LlamaParse(api_key=KEY, base_url=f"http://127.0.0.1:{runner.addresses[0][1]}", **TIER)
    # a job that only seems to be gone would be made, and paid for, again
    for asking in (finished(parser, path), parser.look("pjb-1")):
        with pytest.raises(ParseError, match="LLAMAPARSE_BASE_URL") as caught:
            await asking
        assert (caught.value.code, caught.value.remedy) == (ErrorCode.PARSE_DENIED, Remedy.PAUSE)
    await parser.close()
    await runner.cleanup()


JOB = {"id": "pjb-1", "project_id": "p", "status": "COMPLETED"}


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {},
        {"job": None},
        {"job": JOB},
        {"job": {**JOB, "status": "SUCCESS"}},
        {"job": JOB, "markdown": {"pages": [{"success": True, "markdown": "x"}]}},
        {"job": JOB, "markdown": {"pages": [{"page_number": 0, "success": True, "markdown": "x"}]}},
        {"job": JOB, "markdown": {"pages": [{"page_number": 1, "success": True, "markdown": "x"}] * 2}},
        {"job": JOB, "markdown": {"pages": [{"page_number": 10**9, "success": True, "markdown": "x"}]}},
    ],
)
async def test_an_answer_of_another_shape_is_no_result(answer: Any) -> None:
    async def show(request: web.Request) -> web.Response:
        del request
        return web.json_response(answer)

    app = web.Application()
    app.router.add_get("/api/v2/parse/pjb-1", show)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    parser = LlamaParse(api_key=KEY, base_url=f"http://127.0.0.1:{runner.addresses[0][1]}", **TIER)
    with pytest.raises(ParseError, match="cannot be read") as caught:
        await parser.look("pjb-1")
    assert caught.value.code is ErrorCode.PARSE_UNAVAILABLE
    await parser.close()
    await runner.cleanup()


# opening


@pytest.mark.parametrize("key", ["", "  ", "llx-a llx-b", "llx-ü"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(PipelineError) as caught:
        LlamaParse(api_key=key, **TIER)
    assert caught.value.code is ErrorCode.SETTING_INVALID


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, *where: Any) -> None:
        del name, where

    monkeypatch.delitem(sys.modules, "llama_cloud", raising=False)
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", find)
    with pytest.raises(PipelineError, match=r"upload-pipeline\[llamaparse\]") as caught:
        LlamaParse(api_key=KEY, **TIER)
    assert caught.value.code is ErrorCode.SETTING_INVALID
