"""The simulator as the official client sees it: files, jobs, statuses, failed pages, faults, webhooks, books."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import llama_cloud
import pytest
from aiohttp import web

from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator
from tests.simulators.llama_cloud_wire import sign
from tests.simulators.simulator_process import running_simulator

PAGES = b"one\ftwo\fthree"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def simulator(clock: Clock) -> AsyncIterator[LlamaCloudSimulator]:
    async with LlamaCloudSimulator(pending=1, running=1, clock=clock) as simulator:
        yield simulator


@pytest.fixture
async def client(simulator: LlamaCloudSimulator) -> AsyncIterator[llama_cloud.AsyncLlamaCloud]:
    async with llama_cloud.AsyncLlamaCloud(api_key=KEY, base_url=simulator.url, max_retries=0, timeout=5.0) as client:
        yield client


async def submit(client: llama_cloud.AsyncLlamaCloud, document: str = "d1", **asked: Any) -> str:
    file = await client.files.create(file=("a.txt", PAGES, "text/plain"), purpose="parse", external_file_id=document)
    job = await client.parsing.create(
        file_id=file.id, tier="cost_effective", version="2026-09-28", user_metadata={"document": document}, **asked
    )
    return job.id


async def test_a_file_is_found_by_its_external_id(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud
) -> None:
    made = await client.files.create(file=("a.txt", b"x", "text/plain"), purpose="parse", external_file_id="e1")
    await client.files.create(file=("b.txt", b"y", "text/plain"), purpose="parse", external_file_id="e2")
    assert [file.id async for file in client.files.list(external_file_id="e1")] == [made.id]
    assert simulator.books.uploads == {"e1": 1, "e2": 1}
    simulator.unique_external_ids = True
    with pytest.raises(llama_cloud.ConflictError):
        await client.files.create(file=("a.txt", b"x", "text/plain"), purpose="parse", external_file_id="e1")


async def test_a_job_goes_through_its_statuses_and_is_paid_for_once(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud, clock: Clock
) -> None:
    parse_id = await submit(client)
    seen = []
    for clock.now in (0, 1, 2):
        seen.append((await client.parsing.get(parse_id, expand=["markdown"])).job.status)
    assert seen == ["PENDING", "RUNNING", "COMPLETED"]
    assert (await client.parsing.get(parse_id, expand=["markdown"])).job.usage is None
    answer = await client.parsing.get(parse_id, expand=["markdown", "usage"])
    assert answer.markdown is not None
    assert [page.markdown for page in answer.markdown.pages if page.success] == ["one", "two", "three"]
    assert answer.job.usage is not None
    assert answer.job.usage.credits == 9
    assert (simulator.books.paid, simulator.books.pages, simulator.books.credits) == ({"d1": 1}, 3, 9)
    assert (await client.parsing.get(parse_id)).markdown is None
    await submit(client)
    assert simulator.books.paid_again() == {"d1": 1}


async def test_jobs_are_listed_in_pages_by_time_with_their_metadata(client: llama_cloud.AsyncLlamaCloud) -> None:
    made = [await submit(client, f"d{number}") for number in range(3)]
    since = datetime.now(UTC) - timedelta(minutes=1)
    listed = [job async for job in client.parsing.list(created_at_on_or_after=since, page_size=2)]
    assert [job.id for job in listed] == made[::-1]
    assert listed[0].user_metadata == {"document": "d2"}
    later = datetime.now(UTC) + timedelta(minutes=1)
    assert [job async for job in client.parsing.list(created_at_on_or_after=later)] == []


@pytest.mark.parametrize("ending", ["FAILED", "CANCELLED"])
async def test_a_job_that_fails_costs_nothing(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud, clock: Clock, ending: str
) -> None:
    simulator.end_next(ending)
    parse_id = await submit(client)
    clock.now = 2
    job = (await client.parsing.get(parse_id, expand=["markdown"])).job
    assert (job.status, bool(job.error_message)) == (ending, ending == "FAILED")
    assert simulator.books.credits == 0


async def test_a_page_that_fails_stands_in_a_completed_job(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud, clock: Clock
) -> None:
    simulator.end_next(failed_pages=(2,))
    parse_id = await submit(client)
    clock.now = 2
    answer = await client.parsing.get(parse_id, expand=["markdown"])
    assert answer.markdown is not None
    assert [page.success for page in answer.markdown.pages] == [True, False, True]
    assert answer.job.status == "COMPLETED"


@pytest.mark.parametrize(
    ("fault", "status", "headers"),
    [
        ("rate_limited", 429, {"retry-after": "1"}),
        ("rate_limited_silent", 429, {}),
        ("quota", 402, {}),
        ("unauthorised", 401, {}),
        ("rejected", 422, {}),
        ("server_error", 500, {"x-should-retry": "true"}),
        ("gone", 404, {}),
    ],
)
async def test_each_refusal(
    simulator: LlamaCloudSimulator,
    client: llama_cloud.AsyncLlamaCloud,
    fault: str,
    status: int,
    headers: dict[str, str],
) -> None:
    simulator.misbehave(fault, operation="submit")
    with pytest.raises(llama_cloud.APIStatusError) as caught:
        await submit(client)
    assert caught.value.status_code == status
    told = {name: caught.value.response.headers.get(name) for name in ("retry-after", "x-should-retry")}
    assert {name: value for name, value in told.items() if value} == headers
    assert simulator.books.paid == {}
    await submit(client)


async def test_a_dropped_answer_leaves_a_paid_job_behind(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud
) -> None:
    simulator.misbehave("dropped", operation="submit")
    with pytest.raises(llama_cloud.APIConnectionError):
        await submit(client)
    assert (simulator.books.paid, simulator.books.lost) == ({"d1": 1}, {"d1": 1})
    assert [job.user_metadata async for job in client.parsing.list()] == [{"document": "d1"}]


async def test_a_hang_does_nothing(simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud) -> None:
    simulator.misbehave("hang", operation="submit")
    with pytest.raises(llama_cloud.APITimeoutError):
        await submit(client.with_options(timeout=0.2))
    assert simulator.books.paid == {}


async def test_a_stalled_answer_leaves_a_paid_job_behind(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud
) -> None:
    simulator.misbehave("stalled", operation="submit")
    with pytest.raises(llama_cloud.APITimeoutError):
        await submit(client.with_options(timeout=0.2))
    assert (simulator.books.paid, simulator.books.lost) == ({"d1": 1}, {"d1": 1})
    assert [job.user_metadata async for job in client.parsing.list()] == [{"document": "d1"}]


@pytest.mark.parametrize(("kind", "seconds"), [("upload", 5), ("submit", 10)])
async def test_of_some_requests_few_seconds_hold_only_so_many(clock: Clock, kind: str, seconds: int) -> None:
    limits = {"upload": "uploads_per_5_s", "submit": "parses_per_10_s"}
    async with (
        LlamaCloudSimulator(clock=clock, **{limits[kind]: 3}) as simulator,
        llama_cloud.AsyncLlamaCloud(api_key=KEY, base_url=simulator.url, max_retries=0) as client,
    ):
        for clock.now in (0.0, 1.0, 2.0):
            await submit(client)
        with pytest.raises(llama_cloud.RateLimitError) as caught:
            await submit(client)
        assert caught.value.response.headers["retry-after"] == str(seconds)
        assert simulator.books.over_window == {kind: 1}
        assert simulator.books.over_limit == 0
        assert simulator.books.requests[kind] == 4
        assert simulator.books.paid == {"d1": 3}
        clock.now = float(seconds)
        await submit(client)
        with pytest.raises(llama_cloud.RateLimitError):
            await submit(client)


async def test_by_default_the_windows_are_those_of_the_documentation(simulator: LlamaCloudSimulator) -> None:
    limits = {kind: (window.limit, window.seconds) for kind, window in simulator._windows.items()}
    assert limits == {"upload": (50, 5.0), "submit": (50, 10.0)}


@pytest.mark.parametrize("listed", [False, True])
async def test_a_file_is_gone_when_its_time_is_over_and_what_was_made_of_it_is_not(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud, clock: Clock, listed: bool
) -> None:
    simulator.expired_listed = listed
    file = await client.files.create(file=("a.txt", PAGES, "text/plain"), purpose="parse", external_file_id="e1")
    left = file.expires_at - datetime.now(UTC)  # type: ignore[operator]
    assert timedelta(hours=47.9) < left <= timedelta(hours=48)
    made = await client.parsing.create(file_id=file.id, tier="fast", version="2026-06-15")
    clock.now = 48 * 3600 - 1
    await client.parsing.create(file_id=file.id, tier="fast", version="2026-06-15")
    clock.now = 48 * 3600
    found = [file async for file in client.files.list(external_file_id="e1")]
    assert len(found) == listed
    assert all(file.expires_at <= datetime.now(UTC) for file in found)
    with pytest.raises(llama_cloud.NotFoundError):
        await client.get(f"/api/v1/beta/files/{file.id}", cast_to=object)
    with pytest.raises(llama_cloud.NotFoundError):
        await client.parsing.create(file_id=file.id, tier="fast", version="2026-06-15")
    assert (await client.parsing.get(made.id, expand=["markdown"])).markdown is not None


async def test_a_wrong_key_is_refused(simulator: LlamaCloudSimulator) -> None:
    async with llama_cloud.AsyncLlamaCloud(api_key="llx-other", base_url=simulator.url, max_retries=0) as client:
        with pytest.raises(llama_cloud.AuthenticationError):
            await client.parsing.get("pjb-1")


@pytest.mark.parametrize("form", ["string", "json"])
async def test_webhooks_are_signed_and_may_come_twice_and_backwards(
    simulator: LlamaCloudSimulator, client: llama_cloud.AsyncLlamaCloud, clock: Clock, form: str
) -> None:
    got: list[tuple[bytes, str]] = []

    async def take(request: web.Request) -> web.Response:
        got.append((await request.read(), request.headers["LC-Signature"]))
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    simulator.webhooks_doubled = simulator.webhooks_reversed = True
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    hook = {"webhook_url": url, "webhook_output_format": form, "webhook_signing_secret": "s"}
    parse_id = await submit(client, webhook_configurations=[hook])
    clock.now = 2
    async with asyncio.timeout(5):
        while len(got) < 6:
            await asyncio.sleep(0.01)
    await runner.cleanup()
    messages = [json.loads(raw) for raw, _ in got]
    if form == "string":
        assert all(isinstance(message, str) for message in messages)
        messages = [json.loads(message) for message in messages]
    kinds = ["parse.success"] * 2 + ["parse.running"] * 2 + ["parse.pending"] * 2
    assert [message["event_type"] for message in messages] == kinds
    assert {message["data"]["job_id"] for message in messages} == {parse_id}
    assert all(signature == sign(raw, "s") for raw, signature in got)


def test_it_runs_by_itself() -> None:
    switches = ("--running", "0", "--requests-per-minute", "7", "--unique-external-ids", "--webhooks-doubled")
    with running_simulator("tests.simulators.llama_cloud", *switches) as url:
        client = llama_cloud.LlamaCloud(api_key=KEY, base_url=url, max_retries=0)

        def misbehave(**asked: Any) -> None:
            httpx.post(f"{url}/misbehave", json=asked).raise_for_status()

        def look() -> Any:
            job = client.parsing.create(file_id=file.id, tier="fast", version="2026-06-15")
            return client.parsing.get(job.id, expand=["markdown"])

        with client:
            misbehave(fault="quota")
            with pytest.raises(llama_cloud.APIStatusError):
                client.parsing.get("pjb-1")
            assert httpx.get(f"{url}/books").json()["faults"] == {"quota": 1}
            file = client.files.create(file=("a.txt", PAGES, "text/plain"), purpose="parse", external_file_id="x")
            with pytest.raises(llama_cloud.ConflictError):
                client.files.create(file=("a.txt", PAGES, "text/plain"), purpose="parse", external_file_id="x")
            misbehave(ending="FAILED")
            misbehave(failed_pages=[2])
            assert look().job.status == "FAILED"
            assert [page.success for page in look().markdown.pages] == [True, False, True]
            with pytest.raises(llama_cloud.RateLimitError):
                look()


def test_a_fault_that_is_none_stops_the_start() -> None:
    with pytest.raises(ValueError, match="no fault bogus"):
        LlamaCloudSimulator(faults={"dropped": 0.1, "bogus": 0.1})
