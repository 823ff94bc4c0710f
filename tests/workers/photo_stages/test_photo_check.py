"""What the first step of a photo waits for and refuses."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from clamd_server import INFECTED
from photo_files import picture, png
from photo_line import PHOTO, OpenLine

from upload_pipeline.errors import ErrorCode
from upload_pipeline.storage.virus_scan import VirusScanner
from upload_workers.steps import Snooze


async def test_bytes_that_are_not_there_are_waited_for_until_the_deadline(open_line: OpenLine) -> None:
    line = await open_line(stored=False)
    job = await line.claim()
    outcome = await line.step(job)
    assert isinstance(outcome, Snooze)
    assert outcome.delay == timedelta(seconds=1)
    await line.admin.execute("update upload_pipeline.photos set upload_deadline = now() - interval '1 s'")
    error = await line.refusal(job)
    assert (error.code, error.retryable) == (ErrorCode.UPLOAD_EXPIRED, False)
    assert "roof.jpg" in error.message
    await line.put(PHOTO)
    assert (await line.run(job)).stage == "uploaded"


@pytest.mark.parametrize("data", [PHOTO[:-1], PHOTO + b"\x00"], ids=["shorter", "longer"])
async def test_another_length_is_refused(open_line: OpenLine, data: bytes) -> None:
    line = await open_line(stored=False)
    await line.put(data)
    error = await line.refusal(await line.claim())
    assert (error.code, error.retryable) == (ErrorCode.CHECKSUM_MISMATCH, False)
    assert error.details["found"] == len(data)


@pytest.mark.parametrize("data", [png(picture(300, 300)), b"%PDF-1.7\n" + PHOTO, b"<html>" + PHOTO])
async def test_another_type_is_refused(open_line: OpenLine, data: bytes) -> None:
    line = await open_line(data)
    assert (await line.refusal(await line.claim())).code is ErrorCode.TYPE_MISMATCH


async def test_infected_bytes_are_removed(open_line: OpenLine, clamd_url: str) -> None:
    line = await open_line(PHOTO + INFECTED)
    guarded = replace(line, context=replace(line.context, scanner=VirusScanner(clamd_url, 20.0)))
    assert (await guarded.refusal(await line.claim())).code is ErrorCode.MALWARE_FOUND
    assert await line.objects() == {}


async def test_bytes_wait_for_a_scanner_that_is_away_and_pass_one_that_finds_nothing(
    open_line: OpenLine, clamd_url: str
) -> None:
    line = await open_line()
    job = await line.claim()
    away = replace(line, context=replace(line.context, scanner=VirusScanner("tcp://127.0.0.1:9", 1.0)))
    assert isinstance(await away.step(job), Snooze)
    there = replace(line, context=replace(line.context, scanner=VirusScanner(clamd_url, 20.0)))
    assert (await there.run(job)).stage == "uploaded"
