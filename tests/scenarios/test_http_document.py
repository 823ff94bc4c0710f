"""docs/http.md does what it says: its blocks are taken out and run, against a service and a worker of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.api.live_service import token
from tests.scenarios.service_process import service_process
from tests.scenarios.world import World
from upload_pipeline.ids import LOCAL_USER_ID

ROOT = Path(__file__).parents[2]
STUB = """
export function createClient() {
  return { auth: { getSession: async () => ({ data: { session: { access_token: process.env.TOKEN } } }) } };
}
"""
BROWSER = """
import { readFile } from "node:fs/promises";
import { upload, follow, search } from "./document.mjs";

const bytes = await readFile("samples/homeowners-policy.pdf");
const job = await upload(new File([bytes], "homeowners-policy.pdf", { type: "application/pdf" }));
const again = await upload(new File([bytes], "homeowners-policy.pdf", { type: "application/pdf" }));
let state;
await follow(job.job_id, (event, ended) => { if (ended) state = event.state; });
const hits = await search("water damage");
console.log(JSON.stringify({ state, duplicate: again.duplicate, files: hits.map((hit) => hit.filename) }));
"""


@dataclass(frozen=True)
class Reader:
    """Somebody who follows the document: an environment, and a folder with the samples."""

    environment: dict[str, str]
    folder: Path

    def run(self, command: list[str], script: str = "") -> str:
        ended = subprocess.run(
            command,
            input=script,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        return ended.stdout


@pytest.fixture
def reader(database: Any, tmp_path: Path) -> Iterator[Reader]:
    world = World(database.admin_url, database.worker_url, tmp_path / "home")
    folder = tmp_path / "folder"
    shutil.copytree(ROOT / "samples", folder / "samples")
    try:
        with service_process(database.worker_url, world.home) as service:
            world.start_worker()
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = {
                **os.environ,
                "PATH": path,
                "API": service.url,
                "TOKEN": token(LOCAL_USER_ID),
                "MANAGER": token(uuid4(), app_metadata={"roles": ["FP_MANAGER"]}),
                "UPLOAD_PIPELINE_HOME": str(world.home),
                "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url,
            }
            yield Reader(environment, folder)
    finally:
        world.kill_all()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    text = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"docs/http.md has no {language}"
    return found


def test_the_commands_run_in_their_order(reader: Reader) -> None:
    for program in ("curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here")
    told = reader.run(["bash", "-euo", "pipefail", "-s"], "\n".join(blocks("sh")))
    assert 'event: end\ndata: {"state":"done"}' in told
    assert "homeowners-policy.pdf, page" in told
    assert '"stage":"chunking"' in told
    assert '"status": "completed"' in told
    assert "Home Plus: " in told
    graph = (reader.folder / "home-plus.graphml").read_text(encoding="utf-8")
    created = re.search(r'"nodes_created": (\d+),\s+"edges_created": (\d+)', told)
    assert created is not None
    assert (graph.count("<node "), graph.count("<edge ")) == (int(created[1]), int(created[2]))


def test_the_python_runs(reader: Reader) -> None:
    told = reader.run([sys.executable, "-"], "\n".join(blocks("python")))
    assert "100 job_done" in told
    assert "homeowners-policy.pdf" in told


def test_the_javascript_runs(reader: Reader) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here")
    package = reader.folder / "node_modules" / "@supabase" / "supabase-js"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"name": "@supabase/supabase-js", "type": "module", "main": "index.js"}')
    (package / "index.js").write_text(STUB)
    (reader.folder / "document.mjs").write_text("\n".join(blocks("js")))
    (reader.folder / "browser.mjs").write_text(BROWSER)
    told = json.loads(reader.run([node, "browser.mjs"]).splitlines()[-1])
    assert told["state"] == "done"
    assert told["duplicate"] is True
    assert set(told["files"]) == {"homeowners-policy.pdf"}
