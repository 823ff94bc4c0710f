"""With a virus scanner set, no byte becomes a document unseen: by no way in, and whatever the scanner does."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest
from clamd_server import INFECTED, SIGNATURE, Conversation, misbehaving

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file, accept_path
from upload_pipeline.intake.receive import receive_upload
from upload_pipeline.intake.reserve import reserve_upload
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.virus_scan import VirusScanner

CLEAN = b"The same words each time.\n" * 4000
EVIL = CLEAN + INFECTED


def behind(intake, url: str, seconds: float = 20.0):
    return replace(intake, scanner=VirusScanner(url, seconds))


@pytest.fixture(params=["stream", "path"])
def take(request, user, tmp_path):
    """Takes bytes in, by either way."""

    async def stream(intake, data: bytes):
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(data), 10_000):
                yield data[start : start + 10_000]

        return await accept_file(
            intake, chunks=chunks(), filename="words.txt", user_id=user, metadata={}, correlation_id=""
        )

    async def local(intake, data: bytes):
        path = tmp_path / "words.txt"
        path.write_bytes(data)
        return await accept_path(intake, path=path, user_id=user, metadata={}, correlation_id="")

    return stream if request.param == "stream" else local


async def refused(intake, traces, take, data: bytes) -> PipelineError:
    """The refusal, of which nothing is left."""
    with pytest.raises(PipelineError) as caught:
        await take(intake, data)
    assert await traces.nothing()
    assert not intake.scratch.exists() or not list(intake.scratch.iterdir())
    return caught.value


async def test_an_infected_file_is_refused_and_leaves_nothing(intake, traces, take, clamd_url):
    error = await refused(behind(intake, clamd_url), traces, take, EVIL)
    assert error.code is ErrorCode.MALWARE_FOUND
    assert error.details == {"filename": "words.txt", "signature": SIGNATURE}


async def test_a_clean_file_is_taken_as_it_is(intake, user, traces, take, clamd_url):
    accepted = await take(behind(intake, clamd_url), CLEAN)
    key = raw_key(user, accepted.document_id)
    assert await traces.keys() == {key}
    assert await traces.store.get_bytes(key, len(CLEAN)) == CLEAN
    assert (await take(behind(intake, clamd_url), CLEAN)).duplicate


async def test_what_was_taken_before_there_was_a_scanner_stays_and_does_not_come_in_again(
    intake, user, traces, clamd_url
):
    async def once() -> AsyncIterator[bytes]:
        yield EVIL

    common = {"filename": "words.txt", "user_id": user, "metadata": {}, "correlation_id": ""}
    first = await accept_file(intake, chunks=once(), **common)
    with pytest.raises(PipelineError) as caught:
        await accept_file(behind(intake, clamd_url), chunks=once(), **common)
    assert caught.value.code is ErrorCode.MALWARE_FOUND
    assert await traces.documents() == [first.document_id]
    assert await traces.keys() == {raw_key(user, first.document_id)}


async def test_without_its_scanner_nothing_is_taken(intake, traces, take, tmp_path):
    error = await refused(behind(intake, f"unix://{tmp_path / 'none'}"), traces, take, CLEAN)
    assert error.code is ErrorCode.SCANNER_UNAVAILABLE


async def test_a_scanner_that_is_away_is_noticed_before_a_byte_is_read(intake, user, traces, tmp_path):
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("a byte was asked for")
        yield b""

    with pytest.raises(PipelineError) as caught:
        await accept_file(
            behind(intake, f"unix://{tmp_path / 'none'}"),
            chunks=never(),
            filename="a.txt",
            user_id=user,
            metadata={},
            correlation_id="",
        )
    assert caught.value.code is ErrorCode.SCANNER_UNAVAILABLE
    assert await traces.nothing()


async def hangs_up(with_: Conversation) -> None:
    await with_.read_stream(20_000)


async def has_it_all_and_hangs_up(with_: Conversation) -> None:
    await with_.read_stream()


async def has_it_all_and_says_nothing(with_: Conversation) -> None:
    await with_.read_stream()
    await asyncio.sleep(30)


async def says_what_is_no_answer(with_: Conversation) -> None:
    await with_.read_stream()
    await with_.say(b"stream: OK, probably\0")


@pytest.mark.parametrize(
    "behaviour", [hangs_up, has_it_all_and_hangs_up, has_it_all_and_says_nothing, says_what_is_no_answer]
)
async def test_a_scanner_that_fails_with_the_bytes_under_way_leaves_nothing(intake, traces, take, behaviour):
    async with misbehaving(behaviour) as url:
        error = await refused(behind(intake, url, 0.4), traces, take, CLEAN)
    assert error.code is ErrorCode.SCANNER_UNAVAILABLE
    assert not (await take(intake, CLEAN)).duplicate


async def test_a_verdict_may_take_longer_than_the_store_waits_for_a_block(intake, traces, take):
    async def thinks(with_: Conversation) -> None:
        await with_.read_stream()
        await asyncio.sleep(0.6)
        await with_.say(b"stream: OK\0")

    patient = replace(intake, store=replace(intake.store, progress_seconds=0.3))
    started = time.monotonic()
    async with misbehaving(thinks) as url:
        assert not (await take(behind(patient, url), CLEAN)).duplicate
    assert time.monotonic() - started > 0.6
    assert len(await traces.keys()) == 1


async def test_while_the_scanner_thinks_a_sender_who_leaves_leaves_nothing(intake, traces, take):
    asked = asyncio.Event()

    async def thinks(with_: Conversation) -> None:
        await with_.read_stream()
        asked.set()
        await asyncio.sleep(30)

    async with misbehaving(thinks) as url:
        taking = asyncio.create_task(take(behind(intake, url), CLEAN))
        await asyncio.wait_for(asked.wait(), 20)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
    assert await traces.nothing()
    assert not list(intake.scratch.iterdir()) if intake.scratch.exists() else True


async def test_announced_bytes_that_are_infected_are_refused_and_awaited_on(intake, user, traces, clamd_url):
    def announced(data: bytes):
        return {"file_bytes": len(data), "file_sha256": hashlib.sha256(data).hexdigest()}

    reserved = await reserve_upload(
        intake,
        filename="words.txt",
        media_type="text/plain",
        user_id=user,
        metadata={},
        correlation_id="",
        window=timedelta(minutes=20),
        **announced(EVIL),
    )

    async def chunks() -> AsyncIterator[bytes]:
        yield EVIL

    with pytest.raises(PipelineError) as caught:
        await receive_upload(
            behind(intake, clamd_url), document_id=reserved.document_id, chunks=chunks(), **announced(EVIL)
        )
    assert caught.value.code is ErrorCode.MALWARE_FOUND
    assert await traces.keys() == set()
    assert await traces.db.fetchval("select upload_deadline is not null from upload_pipeline.documents")
