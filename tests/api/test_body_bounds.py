"""Bodies that do not end, stop, or are not wanted: the answer is read, and the connection does not stay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from live_service import LiveService, new_user, running_service, service_settings, token
from raw_requests import Connection, connected

SEARCH = "/api/v2/search"
STOP_SECONDS = 0.4


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    settings = service_settings(database.worker_url, tmp_path, api_body_timeout=STOP_SECONDS)
    async with running_service(settings) as running:
        yield running


async def pour(connection: Connection, block: bytes = b"x" * 65536) -> int:
    """Sends for as long as somebody takes it; returns how many bytes went."""
    sent = 0
    try:
        async with asyncio.timeout(15):
            while True:
                await connection.chunk(block)
                sent += len(block)
    except OSError:
        return sent


async def test_a_sender_that_stops_is_answered_and_let_go(service: LiveService) -> None:
    for announced in ({"Content_Length": "5000"}, {"Transfer_Encoding": "chunked"}):
        async with connected(service.url) as connection:
            began = time.monotonic()
            headers = {"Content_Type": "application/json", "Authorization": f"Bearer {token(new_user())}"}
            await connection.start("POST", SEARCH, **headers, **announced)
            answer = await connection.answer()
            assert STOP_SECONDS <= time.monotonic() - began < 30
            assert (answer.status, answer.error["code"]) == (408, "REQUEST_TIMEOUT")


async def test_a_sender_that_is_slow_but_goes_on_is_waited_for(service: LiveService) -> None:
    body = b'{"query": "slow"}'
    async with connected(service.url) as connection:
        headers = {"Content_Type": "application/json", "Authorization": f"Bearer {token(new_user())}"}
        await connection.start("POST", SEARCH, **headers, Content_Length=str(len(body)))
        for begin in range(0, len(body), 6):
            await asyncio.sleep(STOP_SECONDS / 2)
            await connection.send(body[begin : begin + 6])
        assert (await connection.answer()).status == 200


async def test_a_body_without_end_is_not_read_to_its_end(service: LiveService) -> None:
    headers = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
    for path, status in ((SEARCH, 413), ("/nowhere", 404), ("/healthz", 405)):
        async with connected(service.url) as connection:
            await connection.start("POST", path, **headers)
            pouring = asyncio.create_task(pour(connection))
            answer = await connection.answer()
            assert (answer.status, answer.headers["connection"]) == (status, "close"), path
            assert answer.headers["x-correlation-id"]
            await pouring


async def test_an_announced_body_that_nobody_wants_costs_the_connection_and_a_small_one_does_not(
    service: LiveService,
) -> None:
    async with connected(service.url) as connection:
        await connection.start("POST", "/nowhere", Content_Length="10000")
        answer = await connection.answer()
        assert (answer.status, "connection" in answer.headers) == (404, False)
        await connection.send(b"x" * 10000)
        await connection.start("GET", "/healthz")
        assert (await connection.answer()).status == 200
    async with connected(service.url) as connection:
        await connection.start("POST", "/nowhere", Content_Length="100000000")
        answer = await connection.answer()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert await connection.closed()


async def test_a_body_that_is_sent_before_the_answer_is_read_does_not_hide_the_answer(service: LiveService) -> None:
    # As usual clients do it: first all is sent, then the answer is read.
    async with connected(service.url) as connection:
        await connection.start("POST", "/nowhere", Content_Length=str(4 * 1024 * 1024))
        for _ in range(64):
            await connection.send(b"x" * 65536)
        assert (await connection.answer()).status == 404


async def test_a_client_that_leaves_is_no_fault(service: LiveService, capsys: pytest.CaptureFixture[str]) -> None:
    async with connected(service.url) as connection:
        headers = {"Content_Type": "application/json", "Authorization": f"Bearer {token(new_user())}"}
        await connection.start("POST", SEARCH, **headers, Content_Length="5000")
        await connection.send(b"{")
    await asyncio.sleep(0.1)
    assert "request_failed" not in "".join(capsys.readouterr())
