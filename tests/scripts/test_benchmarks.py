"""Each benchmark runs to its end, at its smallest; its last line is what `--json` promises. Nothing is timed here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ["ceiling", "ours", "ours+chunks"]
SMALL = {
    "batch": ["--counts", "2", "--repetitions", "1"],
    "embed": ["--texts", "48", "--repetitions", "1", "--concurrency", "2", "--latency", "0.01", "--only", *OURS],
    "http": ["--repetitions", "1", "--seconds", "0.3", "--uploads", "2", "--megabytes", "0.1"],
    "ingest": [],
    "queue": ["--repetitions", "1", "--scale", "0.002"],
    "upload_memory": ["--uploads", "2", "--megabytes", "1"],
}
PEERS = {"queue": "pgqueuer"}


def test_none_is_forgotten() -> None:
    assert {path.name.removesuffix("_bench.py") for path in (ROOT / "benchmarks").glob("*_bench.py")} == SMALL.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "embed" else [pytest.mark.slow]) for name in SMALL]
)
def test_it_runs(name: str) -> None:
    if name in PEERS and importlib.util.find_spec(PEERS[name]) is None:
        pytest.skip(f"{PEERS[name]} is not installed: `scripts/bench {name}` once, and it is")
    command = [sys.executable, "-m", f"benchmarks.{name}_bench", "--json", *SMALL[name]]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1])["bench"] == name.replace("_", "-")
