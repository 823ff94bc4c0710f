"""A file is clean only where a scanner had all of it and said so; all else has a name, and none of them is clean."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from clamd_server import INFECTED, SIGNATURE, STREAM_MAX_BYTES, Behaviour, Conversation, misbehaving, running_clamd

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.virus_scan import PIECE_BYTES, VirusScanner, open_scanner


async def given(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def scanned(scanner: VirusScanner, *chunks: bytes) -> bytes:
    """What came out of the scan, where it is clean."""
    async with scanner.scan("a.txt") as scan:
        passed = b"".join([chunk async for chunk in scan.passing(given(*chunks))])
        await scan.verdict()
        return passed


async def refused(scanner: VirusScanner, *chunks: bytes) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        await scanned(scanner, *chunks)
    return caught.value


class TestRealClamd:
    @pytest.fixture
    def scanner(self, clamd_url: str) -> VirusScanner:
        return VirusScanner(clamd_url, 30)

    @pytest.mark.parametrize("data", [b"", b"x", b"harmless " * 100_000, bytes(STREAM_MAX_BYTES)])
    async def test_what_is_clean_passes_unchanged(self, scanner: VirusScanner, data: bytes) -> None:
        assert await scanned(scanner, data) == data

    async def test_the_signature_is_found_wherever_it_stands_and_however_it_is_cut(self, scanner: VirusScanner) -> None:
        around = b"words " * 150_000
        for data in (INFECTED, around + INFECTED, INFECTED + around):
            for size in (len(data), 7, 100_000):
                if len(data) / size > 1000:
                    continue
                error = await refused(scanner, *(data[at : at + size] for at in range(0, len(data), size)))
                assert error.code is ErrorCode.MALWARE_FOUND
                assert error.details == {"filename": "a.txt", "signature": SIGNATURE}
                assert not error.retryable

    async def test_an_empty_chunk_is_not_the_end_of_the_stream(self, scanner: VirusScanner) -> None:
        assert (await refused(scanner, b"begins well", b"", INFECTED)).code is ErrorCode.MALWARE_FOUND

    async def test_a_file_longer_than_clamd_takes_is_not_called_clean(self, scanner: VirusScanner) -> None:
        error = await refused(scanner, *[bytes(PIECE_BYTES)] * 40)
        assert error.code is ErrorCode.SCANNER_UNAVAILABLE
        assert "StreamMaxLength" in error.message

    async def test_a_file_that_clamd_would_not_look_into_is_refused_where_it_says_so(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with running_clamd(tmp_path_factory.mktemp("c"), max_file_bytes=1_000_000) as url:
            error = await refused(VirusScanner(url, 30), bytes(2_000_000))
        assert error.code is ErrorCode.MALWARE_FOUND
        assert error.details["signature"].startswith("Heuristics.Limits.Exceeded")

    async def test_many_at_once_each_get_their_own_verdict(self, scanner: VirusScanner) -> None:
        async def one(number: int) -> bool:
            data = b"%d " % number * 1000 + (INFECTED if number % 3 == 0 else b"")
            try:
                return await scanned(scanner, data) == data
            except PipelineError as error:
                return error.code is not ErrorCode.MALWARE_FOUND

        assert await asyncio.gather(*map(one, range(40))) == [number % 3 != 0 for number in range(40)]

    async def test_a_verdict_that_comes_at_once_is_a_verdict(self, scanner: VirusScanner) -> None:
        """clamd may have answered and hung up before the sender has seen its last byte go."""
        started = time.monotonic()
        for _ in range(300):
            await scanned(scanner, b"x")
            if time.monotonic() - started > 3:
                break

    async def test_what_the_source_raises_comes_out_and_clamd_goes_on(self, scanner: VirusScanner) -> None:
        async def breaking_off() -> AsyncIterator[bytes]:
            yield b"half"
            raise ConnectionResetError("the browser went away")

        with pytest.raises(ConnectionResetError, match="the browser went away"):  # noqa: PT012
            async with scanner.scan("a.txt") as scan:
                async for _ in scan.passing(breaking_off()):
                    pass
        assert await scanned(scanner, b"next") == b"next"

    async def test_a_verdict_on_half_a_file_is_refused(self, scanner: VirusScanner) -> None:
        async with scanner.scan("a.txt") as scan:
            passing = scan.passing(given(b"half", b"other half"))
            assert await anext(passing) == b"half"
            with pytest.raises(PipelineError) as caught:
                await scan.verdict()
            await passing.aclose()
        assert caught.value.code is ErrorCode.SCANNER_UNAVAILABLE

    async def test_the_check_tells_what_it_takes(self, scanner: VirusScanner) -> None:
        assert (await scanner.version()).startswith("ClamAV ")
        await scanner.check(STREAM_MAX_BYTES)
        with pytest.raises(PipelineError, match="StreamMaxLength"):
            await scanner.check(STREAM_MAX_BYTES + 1)


async def hangs_up_at_once(_: Conversation) -> None:
    pass


async def hangs_up_in_the_middle(with_: Conversation) -> None:
    await with_.read_stream(100_000)


async def hangs_up_without_an_answer(with_: Conversation) -> None:
    await with_.read_stream()


async def is_cut_off_in_its_answer(with_: Conversation) -> None:
    await with_.read_stream()
    await with_.say(b"stream: OK")


async def says_ok_to_half_a_file(with_: Conversation) -> None:
    await with_.read_stream(100_000)
    await with_.say(b"stream: OK\0")


async def says_two_things(with_: Conversation) -> None:
    await with_.read_stream()
    await with_.say(b"stream: OK\0stream: Evil FOUND\0")


async def speaks_http(with_: Conversation) -> None:
    await with_.read_stream()
    await with_.say(b"HTTP/1.1 200 OK\r\n\r\nstream: OK\0")


async def never_stops_talking(with_: Conversation) -> None:
    await with_.read_stream()
    for _ in range(1000):
        await with_.say(b"x" * 10_000)


async def reports_an_error(with_: Conversation) -> None:
    await with_.read_stream()
    await with_.say(b"Can't allocate memory ERROR\0")


async def says_nothing(with_: Conversation) -> None:
    await with_.read_stream()
    await asyncio.sleep(30)


async def reads_nothing(_: Conversation) -> None:
    await asyncio.sleep(30)


MISBEHAVIOUR: list[Behaviour] = [
    hangs_up_at_once,
    hangs_up_in_the_middle,
    hangs_up_without_an_answer,
    is_cut_off_in_its_answer,
    says_ok_to_half_a_file,
    says_two_things,
    speaks_http,
    never_stops_talking,
    reports_an_error,
    says_nothing,
    reads_nothing,
]


@pytest.mark.parametrize("behaviour", MISBEHAVIOUR)
async def test_a_scanner_that_misbehaves_never_makes_a_file_clean(behaviour: Behaviour) -> None:
    started = time.monotonic()
    async with misbehaving(behaviour) as url:
        # more than the buffers of both sockets hold
        error = await refused(VirusScanner(url, 0.5), *[bytes(PIECE_BYTES)] * 24)
    assert error.code is ErrorCode.SCANNER_UNAVAILABLE
    assert error.retryable
    assert time.monotonic() - started < 10


async def test_a_scanner_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url in (f"tcp://127.0.0.1:{port}", f"unix://{tmp_path / 'none'}", "tcp://no-such-host.invalid:3310"):
        error = await refused(VirusScanner(url, 10), b"x")
        assert error.code is ErrorCode.SCANNER_UNAVAILABLE
        assert url in error.message
        with pytest.raises(PipelineError):
            await VirusScanner(url, 10).version()


async def test_a_slow_scanner_slows_the_source_and_nothing_piles_up() -> None:
    read = 0
    given_out = 0
    furthest_ahead = 0

    async def slow(with_: Conversation) -> None:
        nonlocal read
        assert await with_.reader.readuntil(b"\0") == b"zINSTREAM\0"
        while part := await with_.reader.read(256 * 1024):
            read += len(part)
            if part.endswith(b"\0\0\0\0\0") and read > 64 * PIECE_BYTES:
                break
            await asyncio.sleep(0.001)
        await with_.say(b"stream: OK\0")

    async def source() -> AsyncIterator[bytes]:
        nonlocal given_out, furthest_ahead
        for _ in range(64):
            given_out += PIECE_BYTES
            furthest_ahead = max(furthest_ahead, given_out - read)
            yield b"x" * PIECE_BYTES

    async with misbehaving(slow) as url, VirusScanner(url, 20).scan("a") as scan:
        async for _ in scan.passing(source()):
            pass
        # between the two are what the sockets buffer, and one piece
        assert furthest_ahead < 16 * 1024 * 1024


async def test_cancelling_a_scan_hangs_up() -> None:
    ended = asyncio.Event()

    async def waits(with_: Conversation) -> None:
        await with_.read_stream()
        await with_.reader.read()
        ended.set()

    async with misbehaving(waits) as url:
        scanning = asyncio.create_task(scanned(VirusScanner(url, 60), b"x"))
        await asyncio.sleep(0.1)
        scanning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scanning
        await asyncio.wait_for(ended.wait(), 10)


@pytest.mark.parametrize("url", ["tcp://localhost:3310", "tcp://[::1]:3310", "unix:///run/clamav/clamd.ctl"])
def test_urls_that_name_a_scanner(url: str) -> None:
    assert open_scanner(url, seconds=3) == VirusScanner(url, 3)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:3310",
        "tcp://localhost",
        "tcp://:3310",
        "tcp://localhost:clamd",
        "tcp://localhost:99999",
        "tcp://u@localhost:3310",
        "unix://run/clamd",
        "unix:///",
        "http://localhost:3310",
        "unix:///a\0b",
    ],
)
def test_urls_that_name_none_are_refused(url: str) -> None:
    with pytest.raises(PipelineError) as caught:
        open_scanner(url)
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert "UPLOAD_PIPELINE_CLAMD_URL" in caught.value.message


def test_no_url_is_no_scanner() -> None:
    assert open_scanner("") is None
