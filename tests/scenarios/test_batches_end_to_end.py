"""Batches from the request to the last document, with a service and workers of their own, and through their crashes."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import psutil
import pytest

from tests.api.live_service import token
from tests.sample_documents import make_document, phrase
from tests.scenarios.service_process import service_process
from tests.scenarios.world import KINDS, World

BATCH = "/api/v1/documents/ingest/batch"
COUNTS = """
select b.batch_id, b.total, b.processed, b.failed, b.open, b.status from upload_pipeline.batch_overview b
"""


def batch_files(count: int, *, first_seed: int = 1) -> list[tuple[str, bytes]]:
    """Documents of all kinds in turn, unlike each other."""
    kinds = [KINDS[n % len(KINDS)] for n in range(count)]
    return [(f"{n}.{kind}", make_document(kind, first_seed + n)) for n, kind in enumerate(kinds)]  # type: ignore[arg-type]


def form(files: list[tuple[str, bytes]], mapping: tuple[str, bytes] | None = None) -> list[Any]:
    parts: list[Any] = [("files", file) for file in files]
    return parts + ([] if mapping is None else [("metadata_mapping", mapping)])


def client_of(url: str, user: UUID) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token(user)}"}, timeout=60)


def until_over(client: httpx.Client, batch: str, seconds: float = 120) -> dict[str, Any]:
    """The status of a batch once nothing of it is open; on the way its counts always add up."""
    deadline = time.monotonic() + seconds
    while True:
        seen: dict[str, Any] = client.get(f"{BATCH}/{batch}/status").raise_for_status().json()
        assert seen["processed_count"] + seen["failed_count"] <= seen["total_documents"]
        if seen["status"] != "in_progress":
            assert seen["processed_count"] + seen["failed_count"] == seen["total_documents"]
            return seen
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)


def logged(path: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


@pytest.fixture
def plain(database: Any, tmp_path: Path) -> Iterator[World]:
    """A world whose workers log as in production."""
    world = World(database.admin_url, database.worker_url, tmp_path, {"UPLOAD_PIPELINE_LOG_FORMAT": "json"})
    yield world
    world.kill_all()


CSV = b'filename,author,tags\n0.pdf,Ines Varga,"roof,storm"\n3.md,Tobias Okafor,fence\n'
JSON = json.dumps({"0.pdf": {"author": "Ines Varga", "tags": ["roof"]}, "4.html": {"category": "faq"}}).encode()


def test_batches_from_request_to_search(plain: World) -> None:
    user = uuid4()
    with service_process(plain.worker_url, plain.home) as service, client_of(service.url, user) as client:
        plain.start_worker()
        ten = client.post(BATCH, files=form(batch_files(10), ("m.csv", CSV))).raise_for_status().json()
        more = client.post(BATCH, files=form(batch_files(5, first_seed=50), ("m.json", JSON))).json()
        broken = [("scan.pdf", b"%PDF-1.7 and no more"), ("empty.txt", b"")]
        mixed = client.post(BATCH, files=form([*batch_files(2, first_seed=80), *broken])).json()
        refused = client.post(BATCH, files=form([(f"{n}.txt", b"file %d" % n) for n in range(101)]))

        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "BATCH_TOO_LARGE")
        for batch, expected in ((ten, (10, 0, "completed")), (more, (5, 0, "completed"))):
            seen = until_over(client, batch["batch_id"])
            assert (seen["processed_count"], seen["failed_count"], seen["status"]) == expected
            assert seen["processing_time_seconds"] > 0
        seen = until_over(client, mixed["batch_id"])
        assert (seen["processed_count"], seen["failed_count"], seen["status"]) == (2, 2, "partial_failure")
        assert {one["filename"]: one["code"] for one in seen["failed_documents"]} == {
            "scan.pdf": "CORRUPT_FILE",
            "empty.txt": "EMPTY_FILE",
        }

        def search(query: str, **wanted: Any) -> list[tuple[str, dict[str, Any]]]:
            body = {"query": query, "limit": 5, "filter": wanted}
            found = client.post("/api/v2/search", json=body).raise_for_status().json()["hits"]
            return [(hit["filename"], hit["metadata"]) for hit in found]

        assert search(phrase(1))[0] == ("0.pdf", {"author": "Ines Varga", "tags": ["roof", "storm"]})
        assert {name for name, _ in search("damage", author="Tobias Okafor")} == {"3.md"}
        assert {name for name, _ in search("damage", category="faq")} == {"4.html"}

        worker_log = plain.home / "worker-0.log"
        for _ in range(100):
            if len(logged(worker_log, "batch_completed")) == 3:
                break
            time.sleep(0.1)
    ids = {ten["batch_id"], more["batch_id"], mixed["batch_id"]}
    completed = {line["batch_id"]: line for line in logged(worker_log, "batch_completed")}
    assert set(completed) == ids
    assert (completed[mixed["batch_id"]]["processed"], completed[mixed["batch_id"]]["failed"]) == (2, 2)
    assert ids < {line["batch_id"] for line in logged(service.log, "batch_started")}
    documents = [line for line in logged(service.log, "batch_document") if line["batch_id"] == mixed["batch_id"]]
    assert [(line["filename"], line["code"]) for line in documents] == [
        ("0.pdf", None),
        ("1.docx", None),
        ("scan.pdf", "CORRUPT_FILE"),
        ("empty.txt", "EMPTY_FILE"),
    ]


def test_a_batch_goes_through_without_being_held_in_memory(plain: World) -> None:
    block = b"The tree fell on the shed during the storm, and nobody was hurt.\n" * 1000

    def body() -> Iterator[bytes]:
        for n in range(5):
            yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="%d.txt"\r\n\r\nfile %d\n' % (n, n)
            yield from [block] * 300
            yield b"\r\n"
        yield b"--b--\r\n"

    with service_process(plain.worker_url, plain.home) as service, client_of(service.url, uuid4()) as client:
        process, peak, over = psutil.Process(service.process.pid), 0, threading.Event()
        before = process.memory_info().rss

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.02):
                peak = max(peak, process.memory_info().rss)

        watching = threading.Thread(target=watch)
        watching.start()
        answer = client.post(BATCH, content=body(), headers={"Content-Type": "multipart/form-data; boundary=b"})
        over.set()
        watching.join()
        assert (answer.status_code, answer.json()["total_documents"]) == (202, 5)
    # 97 MB have gone through
    assert peak - before < 30_000_000


async def test_a_batch_of_forty_survives_kills_of_the_service_and_of_workers(world: World) -> None:
    """Everything is killed while the batch is at work, the service also while it receives one; then all goes on."""
    user, files = uuid4(), batch_files(40, first_seed=200)
    admin = await asyncpg.connect(world.admin_url)
    await admin.execute("select upload_pipeline.set_lane_cap($1, 'default', 8)", user)

    def first_life() -> str:
        batch = ""
        with (  # noqa: PT012 - it is killed within
            pytest.raises(AssertionError, match="the service ended"),
            service_process(world.worker_url, world.home) as service,
            client_of(service.url, user) as client,
        ):
            for _ in range(2):
                world.start_worker()
            batch = client.post(BATCH, files=form(files)).raise_for_status().json()["batch_id"]
            deadline = time.monotonic() + 60
            while not client.get(f"{BATCH}/{batch}/status").json()["processed_count"]:
                assert time.monotonic() < deadline
                time.sleep(0.02)

            def dying() -> Iterator[bytes]:
                """A batch that has not come whole when everything dies."""
                yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nwords\r\n'
                yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="b.txt"\r\n\r\n'
                yield b"words " * 20_000
                for victim in (*world.workers, service.process):
                    victim.send_signal(signal.SIGKILL)
                    victim.wait()

            with pytest.raises(httpx.HTTPError):
                client.post(BATCH, content=dying(), headers={"Content-Type": "multipart/form-data; boundary=b"})
        return batch

    batch = await asyncio.to_thread(first_life)
    (row,) = await admin.fetch(COUNTS)
    assert (str(row["batch_id"]), row["total"], row["status"]) == (batch, 40, "in_progress")
    assert row["processed"] + row["failed"] + row["open"] == 40
    assert 0 < row["processed"] < 40

    def second_life() -> dict[str, Any]:
        with service_process(world.worker_url, world.home) as service, client_of(service.url, user) as client:
            seen = client.get(f"{BATCH}/{batch}/status").raise_for_status().json()
            assert seen["processed_count"] == row["processed"]
            world.start_worker()
            return until_over(client, batch)

    seen = await asyncio.to_thread(second_life)
    assert (seen["processed_count"], seen["failed_count"], seen["status"]) == (40, 0, "completed")
    assert await admin.fetchval("select count(*) from upload_pipeline.documents where searchable_at is not null") == 40
    assert await admin.fetchval("select count(*) from upload_pipeline.upload_jobs") == 40
    told = "select count(*) from upload_pipeline.events where code = 'batch_completed'"
    for _ in range(100):
        if await admin.fetchval(told):
            break
        await asyncio.sleep(0.1)
    assert await admin.fetchval(told) == 1
    await admin.close()
