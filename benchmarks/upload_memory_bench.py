"""`scripts/bench upload-memory`: how much memory uploads take that come all at once.

The service runs as a process of its own on an embedded database and a local store. Files of different bytes, half of
them text and half PDF, are sent as forms at the same moment. The peak is the process's own high-water mark, set back
before the uploads where the system can (Linux), else the largest of the samples. The processes that open PDFs are
apart: each has a memory limit of its own (`PARSE_MEMORY_BYTES`), and they end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import aiohttp
import psutil

from upload_pipeline.api.development_tokens import development_token
from upload_pipeline.database.embedded import ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations
from upload_pipeline.settings import load_settings

MEGABYTE = 1_000_000
AIM_BYTES = 64 * MEGABYTE
START_SECONDS = 60.0
SAMPLE_SECONDS = 0.01
BLOCK_BYTES = 64 * 1024
BOUNDARY = "the-bench"


@dataclass
class Memory:
    """Resident bytes of a process and, apart, of its children."""

    process: psutil.Process
    peak: int = 0
    children_peak: int = 0
    idle: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Samples until left."""
        self.idle = self.peak = self.process.memory_info().rss
        kernel_counts = self._reset_mark()
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            if kernel_counts:
                self.peak = max(self.peak, self._mark())

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self.process.memory_info().rss)
            together = 0
            for child in self.process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    together += child.memory_info().rss
            self.children_peak = max(self.children_peak, together)

    def _reset_mark(self) -> bool:
        try:
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _mark(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024


def main(arguments: list[str]) -> None:
    """Runs the benchmark; with `--json` the last line is one object."""
    parser = argparse.ArgumentParser(prog="scripts/bench upload-memory", description=__doc__)
    parser.add_argument("--uploads", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=25, help="size of each file")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    size = options.megabytes * MEGABYTE
    with tempfile.TemporaryDirectory(prefix="bench-") as home_name:
        home = Path(home_name)
        apply_migrations(ensure_embedded(home).admin_url)
        try:
            with _service(home, size) as (url, process):
                memory = Memory(psutil.Process(process.pid))
                token = development_token(load_settings(home=home), UUID(int=1))
                seconds = asyncio.run(_measure(url, token, memory, options.uploads, size))
        finally:
            stop_embedded(home)
    raised = memory.peak - memory.idle
    rate = options.uploads * size / MEGABYTE / seconds
    print(f"{options.uploads} uploads of {options.megabytes} MB at once: {seconds:.1f} s, {rate:.0f} MB/s\n")
    for name, count in {
        "idle": memory.idle,
        "peak": memory.peak,
        "peak minus idle": raised,
        "its children, apart": memory.children_peak,
    }.items():
        print(f"{name:22}{count / MEGABYTE:9.1f} MB")
    print(f"\nThe aim is less than {AIM_BYTES // MEGABYTE} MB in all: {'met' if raised < AIM_BYTES else 'MISSED'}.")
    if options.json:
        told = {
            "raised_mb": raised,
            "idle_mb": memory.idle,
            "peak_mb": memory.peak,
            "children_peak_mb": memory.children_peak,
        }
        figures = {name: round(count / MEGABYTE, 1) for name, count in told.items()}
        ratios = {"raised_to_sent": round(raised / (options.uploads * size), 4)}
        print(json.dumps({"bench": "upload-memory", "ratios": ratios, **figures, "mb_per_s": round(rate, 1)}))


async def _measure(url: str, token: str, memory: Memory, uploads: int, size: int) -> float:
    headers = {
        "Authorization": f"Bearer {token}",
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
    }
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=uploads)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:

        async def send(number: int) -> None:
            async with session.post(f"{url}/api/v2/upload", data=_form(number, size)) as answer:
                assert answer.status == 202, await answer.text()

        with memory.watched():
            began = time.perf_counter()
            await asyncio.gather(*(send(number) for number in range(uploads)))
            return time.perf_counter() - began


async def _form(number: int, size: int) -> AsyncIterator[bytes]:
    """A form with a file that no other number has; made as it is sent, so that it needs no memory here."""
    kind = "pdf" if number % 2 else "txt"
    head, tail = _pdf_around(size) if number % 2 else (b"", b"")
    disposition = f'Content-Disposition: form-data; name="file"; filename="file{number}.{kind}"'
    yield f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode() + head
    left = size - len(head) - len(tail)
    block = (f"words of file {number} ".encode() * BLOCK_BYTES)[: BLOCK_BYTES - 1] + b"\n"
    while left:
        yield block[:left]
        left -= min(left, len(block))
    yield tail + f"\r\n--{BOUNDARY}--\r\n".encode()


def _pdf_around(size: int) -> tuple[bytes, bytes]:
    """Beginning and end of a PDF of one page, between which stand the bytes of a stream that no page shows."""
    page = b"/Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< " + page + b" >>",
        b"<< /Length 36 >>\nstream\nBT /F1 12 Tf 72 400 Td (A page) Tj ET\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    head = b"%PDF-1.7\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(head))
        head += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    offsets.append(len(head))
    # Numbers of a fixed width, so that the end is as long as it will be.
    opening = b"6 0 obj\n<< /Length %010d >>\nstream\n"
    closing = b"\nendstream\nendobj\n"
    table = b"xref\n0 7\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = table + b"trailer\n<< /Size 7 /Root 1 0 R >>\nstartxref\n%010d\n%%%%EOF\n"
    content = size - len(head) - len(opening % 0) - len(closing) - len(end % 0)
    return head + opening % content, closing + end % (size - len(end % 0))


@contextmanager
def _service(home: Path, size: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    settings = {
        "HOME": str(home),
        "API_PORT": "0",
        "LOG_LEVEL": "error",
        "MAX_FILE_BYTES": str(size),
        "LIMIT_UPLOADS_PER_MINUTE": "100000",
        "LIMIT_UPLOADS_PER_DAY": "100000",
    }
    environment = {**os.environ, **{f"UPLOAD_PIPELINE_{name}": value for name, value in settings.items()}}
    log = home / "service.log"
    command = [str(Path(sys.executable).parent / "upload-pipeline"), "serve"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _await_url(process, log), process
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _await_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"API at (http://\S+?),", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start: {log.read_text()}")


if __name__ == "__main__":
    main(sys.argv[1:])
