"""`scripts/bench batch [FOLDER]`: documents a minute of whole batches over HTTP, from the request to the last document.

A service and a worker of their own, on the embedded database, with the local store, parser and embedder. Then the same
files again for another user without HTTP, as `upload-pipeline ingest` takes them: the ratio says what HTTP costs.
Without FOLDER: made documents of all kinds, some two pages each. With one: its files, and where there are too few,
copies that differ in their last bytes. Each user has as many jobs at work as the default cap allows, or as --cap says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import jwt
import uvloop

from tests.sample_documents import KINDS, make_document
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.embedded import ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations
from upload_pipeline.database.pools import BoundedPool, open_pool
from upload_pipeline.errors import PipelineError
from upload_pipeline.intake.accept import accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.media_types import HEAD_BYTES, detect_media_type
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.settings import Settings, load_settings
from upload_pipeline.storage.store import open_store

BATCH = "/api/v1/documents/ingest/batch"
SECRET = "of this benchmark only, and long enough for HS256"  # noqa: S105 - signs nothing else
ISSUER = "https://bench.invalid/auth/v1"
INTAKES = 4
"""Files on their way in at once without HTTP, as in the terminal."""

LOOK_SECONDS = 0.25


def main(arguments: list[str]) -> None:
    """Runs the benchmark; with `--json` the last line is one object."""
    parser = argparse.ArgumentParser(prog="scripts/bench batch", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 100], metavar="N", help="files of a batch")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=4, help="jobs that the worker leads at once")
    parser.add_argument("--cap", type=int, help="jobs of a user at work at once; default: as it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as home_name:
        home = Path(home_name)
        database = ensure_embedded(home)
        try:
            apply_migrations(database.admin_url)
            settings = load_settings(home=home, database_url=database.worker_url, log_level="error")
            files = _files(options.folder, home / "files", max(options.counts))
            size = sum(path.stat().st_size for path in files) / len(files) / 1e3
            with _service(home, database.worker_url) as url, _worker(home, database.worker_url, options.concurrency):
                rates = uvloop.run(_measure(settings, url, files, options))
        finally:
            stop_embedded(home)
    print(f"\ndocuments a minute, medians of {options.repetitions}; {size:.0f} kB a file\n")
    print(f"{'files':>8}{'stored':>12}{'over HTTP':>12}{'without':>12}{'ratio':>8}")
    told = {}
    for count, by_way in rates.items():
        middle = {way: statistics.median(values) for way, values in by_way.items()}
        ratio = middle["http"] / middle["direct"]
        print(f"{count:8}{middle['stored']:12,.0f}{middle['http']:12,.0f}{middle['direct']:12,.0f}{ratio:8.2f}")
        told[str(count)] = {**{way: round(value) for way, value in middle.items()}, "ratio": round(ratio, 3)}
    print("\n`stored`: until the answer 202, when all bytes are in the store and all jobs are queued.")
    if options.json:
        print(json.dumps({"bench": "batch", "kb_per_file": round(size, 1), "documents_per_minute": told}))


def _files(folder: Path | None, made: Path, count: int) -> list[Path]:
    made.mkdir()
    sources: list[tuple[str, bytes]] = []
    for path in sorted(folder.rglob("*")) if folder is not None else ():
        if path.is_file():
            data = path.read_bytes()
            try:
                detect_media_type(path.name, data[:HEAD_BYTES], size=len(data))
            except PipelineError:
                continue
            sources.append((path.name, data))
    paths = []
    for n in range(count):
        if folder is None:
            kind = KINDS[n % len(KINDS)]
            name, data = f"{n}.{kind}", make_document(kind, n)
        else:
            name, data = sources[n % len(sources)]
            name, data = f"{n}-{name}", data + b"\n" * (n // len(sources))
        path = made / name
        path.write_bytes(data)
        paths.append(path)
    return paths


async def _measure(
    settings: Settings, url: str, files: Sequence[Path], options: argparse.Namespace
) -> dict[int, dict[str, list[float]]]:
    database_url = settings.database_url.get_secret_value()
    pool = await open_pool(database_url, connection_options(settings), size=INTAKES + 2)
    parser = LocalParser(settings.parse_timeout, settings.parse_memory_bytes)
    intake = Intake(
        pool,
        open_store(settings.effective_storage_url),
        parser.inspect,
        settings.max_file_bytes,
        settings.home / "scratch",
    )
    rates: dict[int, dict[str, list[float]]] = {}
    try:
        await _direct(pool, intake, await _user(pool, options.cap), files[:5])  # the parts are loaded before the clock
        for repetition in range(options.repetitions):
            for count in options.counts:
                by_way = rates.setdefault(count, {"stored": [], "http": [], "direct": []})
                stored, done = await _http(pool, url, await _user(pool, options.cap), files[:count])
                direct = await _direct(pool, intake, await _user(pool, options.cap), files[:count])
                for way, seconds in (("stored", stored), ("http", done), ("direct", direct)):
                    by_way[way].append(count / seconds * 60)
                shown = "  ".join(f"{way} {values[-1]:8,.0f}" for way, values in by_way.items())
                print(f"{repetition + 1}/{options.repetitions}  {count:4} files  {shown}", flush=True)
    finally:
        parser.close()
        await pool.close()
    return rates


async def _user(pool: BoundedPool, cap: int | None) -> UUID:
    """A user who has sent nothing yet, so that nothing is known before."""
    user = uuid4()
    if cap is not None:
        await pool.fetchval("select upload_pipeline.set_lane_cap($1, 'default', $2)", user, cap)
    return user


async def _http(pool: BoundedPool, url: str, user: UUID, files: Sequence[Path]) -> tuple[float, float]:
    """Seconds until the batch is stored, and until it is over."""
    now = int(time.time())
    claims = {"sub": str(user), "aud": "authenticated", "iss": ISSUER, "role": "authenticated", "exp": now + 3600}
    headers = {"Authorization": f"Bearer {jwt.encode(claims, SECRET, algorithm='HS256')}"}
    parts = [("files", (path.name, path.read_bytes())) for path in files]
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600) as client:
        began = time.perf_counter()
        answer = await client.post(BATCH, files=parts)
        stored = time.perf_counter() - began
        if answer.status_code != 202:
            raise SystemExit(answer.text)
        batch = answer.json()["batch_id"]

        async def over() -> bool:
            return bool((await client.get(f"{BATCH}/{batch}/status")).json()["status"] != "in_progress")

        await _until(over)
        seconds = time.perf_counter() - began
        status = (await client.get(f"{BATCH}/{batch}/status")).json()
        for failed in status["failed_documents"]:
            print(f"failed: {failed['filename']}: {failed['code']}")
        return stored, seconds


async def _direct(pool: BoundedPool, intake: Intake, user: UUID, files: Sequence[Path]) -> float:
    """Seconds that the same files take without HTTP."""
    waiting = iter(files)

    async def take() -> None:
        for path in waiting:
            try:
                await accept_path(intake, path=path, user_id=user, metadata={}, correlation_id="bench")
            except PipelineError as error:
                print(f"refused: {path.name}: {error.code}")

    async def over() -> bool:
        open_jobs = await pool.fetchval("select upload_pipeline.count_open_jobs($1, 1)", user)
        return open_jobs == 0

    began = time.perf_counter()
    await asyncio.gather(*(take() for _ in range(INTAKES)))
    await _until(over)
    return time.perf_counter() - began


async def _until(over: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(900):
        while not await over():
            await asyncio.sleep(LOOK_SECONDS)


@contextmanager
def _service(home: Path, database_url: str) -> Iterator[str]:
    limits = {f"LIMIT_{name}": "1000000" for name in ("UPLOADS_PER_MINUTE", "REQUESTS_PER_HOUR", "OPEN_JOBS")}
    given = {
        **limits,
        "LIMIT_BATCH_FILES_PER_DAY": "1000000",
        "JWT_SECRET": SECRET,
        "JWT_ISSUER": ISSUER,
        "API_PORT": "0",
    }
    with _process(home, database_url, "serve", given) as log:
        while not (found := re.search(r"API at (http://[^\s,]+)", log.read_text())):
            time.sleep(0.05)
        yield found[1]


@contextmanager
def _worker(home: Path, database_url: str, concurrency: int) -> Iterator[None]:
    with _process(home, database_url, "worker", {"WORKER_CONCURRENCY": str(concurrency)}):
        yield


@contextmanager
def _process(home: Path, database_url: str, command: str, given: dict[str, str]) -> Iterator[Path]:
    settings = {"HOME": str(home), "DATABASE_URL": database_url, "LOG_LEVEL": "error", **given}
    environment = {**os.environ, **{f"UPLOAD_PIPELINE_{name}": value for name, value in settings.items()}}
    log = home / f"{command}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "upload-pipeline"), command],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield log
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main(sys.argv[1:])
