"""docs/detection.md does what it says, and a killed worker leaves every photo detected."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.detection_jobs import add_project, add_waiting_photo, photo_of
from tests.scenarios.document_reader import ROOT, Reader, blocks
from tests.scenarios.service_process import ServiceProcess, service_process
from tests.scenarios.world import World
from tests.simulators.openai_vision import KEY, VisionSimulator
from upload_pipeline.errors import ErrorCode
from upload_pipeline.settings import Settings
from upload_pipeline.storage.store import open_store

SECRET = "a-secret-of-the-document-that-is-long-enough"


async def test_a_killed_worker_leaves_every_photo_detected_and_pays_again_only_what_was_under_way(
    world: World, admin: asyncpg.Connection
) -> None:
    project, user = await add_project(admin, uuid4()), uuid4()
    await admin.execute(
        "select upload_pipeline.set_member((select organization_id from upload_pipeline.projects), $1, 'member')", user
    )
    store = open_store(world.settings.effective_storage_url)
    async with VisionSimulator(latency=0.3) as vision:
        world.environment |= {
            "UPLOAD_PIPELINE_DETECTOR": "openai",
            "UPLOAD_PIPELINE_OPENAI_API_KEY": KEY,
            "UPLOAD_PIPELINE_OPENAI_BASE_URL": vision.url,
            "UPLOAD_PIPELINE_DETECTION_TIMEOUT": "3",
        }
        photos = [
            await add_waiting_photo(admin, project, user, store=store, stage="extracted", types=["damage", "material"])
            for _ in range(6)
        ]
        victim = world.start_worker()
        async with asyncio.timeout(60):
            while vision.books.answered < 2 or not vision._in_flight:
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.15)
        victim.send_signal(signal.SIGKILL)
        world.start_worker()
        assert await asyncio.to_thread(victim.wait) != 0
        assert await world.until_ended(90) == {"done": 6}
        rows = [await photo_of(admin, photo.photo_id) for photo in photos]
        assert {row["status"] for row in rows} == {"completed"}
        assert all(len(json.loads(row["detections"])) == 2 for row in rows)
        assert len(vision.books.paid) == 6
        # what the worker was asking, or had an answer to that was not stored yet
        assert sum(vision.books.paid.values()) <= 6 + vision.books.most_in_flight
        assert vision.books.over_limit == 0


@pytest.fixture
def port() -> int:
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
    return found


@pytest.fixture
def service(database: Any, tmp_path: Path) -> Iterator[ServiceProcess]:
    with service_process(database.worker_url, tmp_path, detection_secret=SECRET) as service:
        yield service


@pytest.fixture
def documented_model(tmp_path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """The model of the document, as it stands there."""
    script = tmp_path / "model.py"
    script.write_text(blocks("detection.md", "python")[0])
    environment = {**os.environ, "SECRET": SECRET, "PORT": str(port)}
    model = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    yield model
    model.kill()
    model.communicate()


async def test_the_models_of_the_document_are_taken_at_their_word(
    world: World,
    admin: asyncpg.Connection,
    database: Any,
    service: ServiceProcess,
    documented_model: subprocess.Popen[str],
    port: int,
) -> None:
    for program in ("curl", "openssl", "psql"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here")
    user = uuid4()
    project = await add_project(admin, user)
    store = open_store(world.settings.effective_storage_url)
    by_hand = await add_waiting_photo(admin, project, user, store=store)
    alarms, settings, callback = blocks("detection.md", "sh")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "API": service.url,
        "MODEL": f"http://127.0.0.1:{port}",
        "SECRET": SECRET,
        "PHOTO": str(by_hand.photo_id),
        "WORKER_URL": database.worker_url,
        "UPLOAD_PIPELINE_HOME": str(world.home),
        "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url,
    }

    reader = Reader(environment, world.home)

    def run(script: str) -> str:
        return reader.run(["bash", "-euo", "pipefail", "-s"], script)

    told = await asyncio.to_thread(run, callback)
    assert json.loads(told) == {"photo_id": str(by_hand.photo_id), "status": "completed", "repeated": False}
    assert "(0 rows)" in await asyncio.to_thread(run, alarms)
    shown = await asyncio.to_thread(run, settings + 'env | grep "^UPLOAD_PIPELINE_"\n')
    assert f"http://127.0.0.1:{port}/detect takes connections" in shown
    world.environment |= dict(
        line.partition("=")[::2] for line in shown.splitlines() if re.match("UPLOAD_PIPELINE_(DETECT|API)", line)
    )

    photo = await add_waiting_photo(admin, project, user, store=store)
    raw_key = await admin.fetchval("select raw_key from upload_pipeline.photos where photo_id = $1", photo.photo_id)
    await store.put_bytes(raw_key, b"\xff\xd8\xff" * 1000)
    world.start_worker()
    async with asyncio.timeout(60):
        while (row := await photo_of(admin, photo.photo_id))["status"] != "completed":
            assert row["status"] == "processing", row["error_message"]
            await asyncio.sleep(0.1)
    assert (row["detector"], row["detections"], row["retry_count"]) == ("webhook", "[]", 0)
    assert documented_model.stdout is not None
    assert documented_model.stdout.readline() == f"{photo.photo_id}: 3000 bytes\n"


def test_every_code_and_setting_that_it_names_is_one() -> None:
    text = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:UPLOAD_PIPELINE_)?((?:DETECTION|OPENAI|DETECTOR)[A-Z_]*)`", text))
    assert len(named) > 8
    assert named <= {name.upper() for name in Settings.model_fields}
    codes = set(re.findall(r"`(DETECT_[A-Z]+)`", text))
    assert codes == {code.value for code in ErrorCode if code.value.startswith("DETECT_")}
