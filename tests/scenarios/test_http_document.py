"""docs/http.md does what it says: its blocks are taken out and run, against a service and a worker of their own."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest

from tests.scenarios.document_reader import Reader, blocks

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


def test_the_commands_run_in_their_order(reader: Reader) -> None:
    for program in ("curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here")
    told = reader.run(["bash", "-euo", "pipefail", "-s"], "\n".join(blocks("http.md", "sh")))
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
    told = reader.run([sys.executable, "-"], "\n".join(blocks("http.md", "python")))
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
    (reader.folder / "document.mjs").write_text("\n".join(blocks("http.md", "js")))
    (reader.folder / "browser.mjs").write_text(BROWSER)
    told = json.loads(reader.run([node, "browser.mjs"]).splitlines()[-1])
    assert told["state"] == "done"
    assert told["duplicate"] is True
    assert set(told["files"]) == {"homeowners-policy.pdf"}
