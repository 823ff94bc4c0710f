"""`scripts/bench http`: what the service answers a second, against a bare FastAPI route and against no HTTP at all.

One process of the service and one with a route that answers a constant, on one machine, in turn within each repetition,
asked by the same client over the same number of connections. Status and search are compared with the bare route, and
uploads with writing the same bytes to the same kind of store without HTTP. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import aiohttp
import jwt
import uvloop

from upload_pipeline.database.embedded import ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.queue import enqueue_jobs
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.storage.store import open_store
from upload_pipeline.text.chunker import CHUNKER

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = UUID("00000000-0000-4000-8000-0000000000b1")
SECRET = "of this benchmark only, and long enough for HS256"  # noqa: S105 - signs nothing else
ISSUER = "https://bench.invalid/auth/v1"
CONNECTIONS = 16
CHUNKS = 1000
BARE = """
import os, uvicorn
from fastapi import FastAPI
app = FastAPI()
@app.get("/bare/{name}")
async def bare(name: str) -> dict[str, str]:
    return {"name": name}
config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False)
class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print("API at http://127.0.0.1:%d, bare" % self.servers[0].sockets[0].getsockname()[1], flush=True)
Server(config).run()
"""


@dataclass(frozen=True)
class Options:
    """How long and how large."""

    repetitions: int
    seconds: float
    uploads: int
    upload_bytes: int


def main(arguments: list[str]) -> None:
    """Runs the benchmark; with `--json` the last line is one object."""
    parser = argparse.ArgumentParser(prog="scripts/bench http", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement of requests")
    parser.add_argument("--uploads", type=int, default=16, help="files of one measurement of uploads")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of each file")
    given = parser.parse_args(arguments)
    options = Options(given.repetitions, given.seconds, given.uploads, int(given.megabytes * 1024 * 1024))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home = Path(folder)
        database = ensure_embedded(home)
        try:
            apply_migrations(database.admin_url)
            rates = uvloop.run(_measure(home, database.admin_url, options))
        finally:
            stop_embedded(home)
    _report(rates, as_json=given.json)


async def _measure(home: Path, admin_url: str, options: Options) -> dict[str, list[float]]:
    url = admin_url.replace("//postgres", "//upload_worker", 1)
    job = await _fill(admin_url)
    rates: dict[str, list[float]] = {}
    with _service(home, url) as service, _bare_route() as bare:
        headers = {"Authorization": f"Bearer {_token()}"}
        connector = aiohttp.TCPConnector(limit=CONNECTIONS)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

            async def get(path: str) -> None:
                async with session.get(path) as answer:
                    await _whole(answer, 200)

            async def search(mode: str) -> None:
                body = {"query": "deductible of water damage", "mode": mode}
                async with session.post(f"{service}/api/v2/search", json=body) as answer:
                    await _whole(answer, 200)

            measurements: dict[str, Callable[[], Awaitable[float]]] = {
                "bare route": lambda: _per_second(lambda: get(f"{bare}/bare/x"), options.seconds),
                "job status": lambda: _per_second(lambda: get(f"{service}/api/v2/jobs/{job}"), options.seconds),
                "search, text": lambda: _per_second(lambda: search("text"), options.seconds),
                "search, hybrid": lambda: _per_second(lambda: search("hybrid"), options.seconds),
                "store alone": lambda: _store_alone(home, options),
                "upload": lambda: _upload(session, service, options),
            }
            for repetition in range(options.repetitions):
                for name, measure in measurements.items():
                    rates.setdefault(name, []).append(await measure())
                    print(f"{repetition + 1}/{options.repetitions}  {name:16} {rates[name][-1]:10,.1f}", flush=True)
    return rates


async def _per_second(call: Callable[[], Awaitable[None]], seconds: float) -> float:
    done = 0
    began = time.perf_counter()

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            await call()
            done += 1

    await asyncio.gather(*(loop() for _ in range(CONNECTIONS)))
    return done / (time.perf_counter() - began)


async def _store_alone(home: Path, options: Options) -> float:
    """Megabytes a second into a store of its own, hashed and streamed as an upload is."""
    store = open_store(f"file://{home / 'alone'}")
    payloads = _payloads(options)
    began = time.perf_counter()

    async def write(payload: bytes) -> None:
        digest = hashlib.sha256()

        async def pieces() -> Any:
            for at in range(0, len(payload), 65536):
                digest.update(payload[at : at + 65536])
                yield payload[at : at + 65536]

        await store.put_stream(f"raw/{USER}/{uuid4()}", pieces(), max_bytes=len(payload))

    await asyncio.gather(*(write(payload) for payload in payloads))
    return sum(map(len, payloads)) / 1e6 / (time.perf_counter() - began)


async def _upload(session: aiohttp.ClientSession, service: str, options: Options) -> float:
    """Megabytes a second by multipart requests, all at once."""
    payloads = _payloads(options)
    began = time.perf_counter()

    async def send(payload: bytes) -> None:
        form = aiohttp.FormData()
        form.add_field("file", payload, filename="bench.txt", content_type="text/plain")
        async with session.post(f"{service}/api/v2/upload", data=form) as answer:
            await _whole(answer, 202)

    await asyncio.gather(*(send(payload) for payload in payloads))
    return sum(map(len, payloads)) / 1e6 / (time.perf_counter() - began)


def _payloads(options: Options) -> list[bytes]:
    """Texts, each another one."""
    return [
        (f"{uuid4()} " * (options.upload_bytes // 37 + 1)).encode()[: options.upload_bytes]
        for _ in range(options.uploads)
    ]


async def _whole(answer: aiohttp.ClientResponse, status: int) -> None:
    body = await answer.read()
    if answer.status != status:
        raise SystemExit(f"{answer.method} {answer.url} answered {answer.status}: {body[:500]!r}")


async def _fill(admin_url: str) -> UUID:
    """A user with a waiting job and a document of many chunks; the job's id."""
    pool = await open_pool(admin_url, size=1)
    embedder = LocalEmbedder()
    try:
        texts = [f"Paragraph {i}: the deductible for water damage number {i * 7919 % 1009}." for i in range(CHUNKS)]
        vectors = await embedder.embed(texts)
        await pool.execute(
            "select upload_pipeline.register_model($1, 'local', $2)", embedder.model, embedder.dimensions
        )
        searched, waiting = uuid4(), uuid4()
        for document in (searched, waiting):
            await pool.execute(
                """
                insert into upload_pipeline.documents
                  (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
                values ($1, $2, 'bench.md', 'text/markdown', 1000, $3, $3)
                """,
                document,
                USER,
                hashlib.sha256(document.bytes).hexdigest(),
            )
        await pool.executemany(
            """
            insert into upload_pipeline.document_chunks
              (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
               heading_path, section_ids, embed_model, embedding, live)
            values (gen_random_uuid(), $1, $2, $3::integer, $4, repeat('a', 64), $5, $3::integer, $3::integer + 1,
                    '{}', '{}', $6, $7, true)
            """,
            [
                (searched, USER, i, text, CHUNKER, embedder.model, vector)
                for i, (text, vector) in enumerate(zip(texts, vectors, strict=True))
            ],
        )
        await pool.execute("analyze")
        (job,) = await enqueue_jobs(pool, [(waiting, USER)])
        return job.job_id
    finally:
        await embedder.close()
        await pool.close()


@contextmanager
def _service(home: Path, database_url: str) -> Iterator[str]:
    huge = "1000000"
    settings = {
        "HOME": str(home),
        "DATABASE_URL": database_url,
        "JWT_SECRET": SECRET,
        "JWT_ISSUER": ISSUER,
        "API_PORT": "0",
        "LOG_LEVEL": "error",
        "LIMIT_UPLOADS_PER_DAY": huge,
        "LIMIT_UPLOADS_PER_MINUTE": huge,
        "LIMIT_STATUS_READS_PER_MINUTE": huge,
        "LIMIT_REQUESTS_PER_HOUR": huge,
        "LIMIT_OPEN_JOBS": huge,
    }
    environment = {**os.environ, **{f"UPLOAD_PIPELINE_{name}": value for name, value in settings.items()}}
    command = [str(Path(sys.executable).parent / "upload-pipeline"), "serve"]
    with _process(command, home / "service.log", environment) as url:
        yield url


@contextmanager
def _bare_route() -> Iterator[str]:
    with (
        tempfile.NamedTemporaryFile() as log,
        _process([sys.executable, "-c", BARE], Path(log.name), dict(os.environ)) as url,
    ):
        yield url


@contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[str]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r"API at (http://[^\s,]+)", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


def _token() -> str:
    now = int(time.time())
    claims = {"sub": str(USER), "aud": "authenticated", "iss": ISSUER, "role": "authenticated", "exp": now + 36000}
    return jwt.encode(claims, SECRET, algorithm="HS256")


def _report(rates: dict[str, list[float]], *, as_json: bool) -> None:
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        name: round(median[name] / median["bare route"], 3) for name in ("job status", "search, text", "search, hybrid")
    }
    ratios["upload"] = round(median["upload"] / median["store alone"], 3)
    print(f"\n{'':16}{'median (least-most)':>30}{'ratio':>9}")
    for name, values in rates.items():
        unit = "MB/s" if name in ("upload", "store alone") else "requests/s"
        spread = f"{median[name]:,.0f} ({min(values):,.0f}-{max(values):,.0f}) {unit}"
        print(f"{name:16}{spread:>30}{ratios.get(name, ''):>9}")
    if as_json:
        print(
            json.dumps(
                {"bench": "http", "ratios": ratios, "rates": {name: round(rate, 1) for name, rate in median.items()}}
            )
        )


if __name__ == "__main__":
    main(sys.argv[1:])
