"""`scripts/bench queue`: jobs a second of this queue and of others, in one run, on one database, at full durability.

Each contender runs in a process of its own. Repetitions are the outermost loop, so that a machine or a disk that
drifts hits all alike; a ratio is the median of ours over the median of the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from upload_pipeline.database.embedded import ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations


@dataclass(frozen=True)
class Contender:
    """Which module's functions to run, and over how many jobs: slow ones get fewer."""

    name: str
    module: str
    drain: str
    enqueue: str
    jobs: int


CONTENDERS = (
    Contender("ours", "ours", "drain", "enqueue", 20_000),
    Contender("ours, 500 users, cap 2", "ours", "drain", "enqueue_users", 20_000),
    Contender("ours, 10 stages", "ours", "drain", "enqueue_stages", 4_000),
    Contender("bare, 1 a statement", "bare", "drain_one", "enqueue", 20_000),
    Contender("bare, 100 a statement", "bare", "drain_hundred", "enqueue", 20_000),
    Contender("pgqueuer", "pgqueuer_queue", "drain", "enqueue", 20_000),
    Contender("procrastinate", "procrastinate_queue", "drain", "enqueue", 3_000),
)
STAGES = 10


def main(arguments: list[str]) -> None:
    """Runs the benchmark; with `--json` the last line is one object."""
    parser = argparse.ArgumentParser(prog="scripts/bench queue", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the jobs, for a quick look")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home = Path(folder)
        database = ensure_embedded(home)
        try:
            apply_migrations(database.admin_url)
            rates = _measure(database.admin_url, options.repetitions, options.scale)
        finally:
            stop_embedded(home)
    _report(rates, as_json=options.json)


def _measure(url: str, repetitions: int, scale: float) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {contender.name: [] for contender in CONTENDERS}
    for repetition in range(repetitions):
        for contender in CONTENDERS:
            jobs = max(100, int(contender.jobs * scale))
            command = [sys.executable, "-m", "benchmarks.queue_bench", "--contender", url]
            command += [contender.module, contender.enqueue, contender.drain, str(jobs)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds = float(done.stdout.splitlines()[-1])
            rates[contender.name].append(jobs / seconds)
            print(f"{repetition + 1}/{repetitions}  {contender.name:24} {jobs / seconds:10,.0f} jobs/s", flush=True)
    return rates


def _report(rates: dict[str, list[float]], *, as_json: bool) -> None:
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: round(median["ours"] / rate, 3) for name, rate in median.items() if not name.startswith("ours")}
    transitions = median["ours, 10 stages"] * STAGES
    print(f"\n{'':26}{'jobs/s, median (least-most)':>34}{'ours / other':>14}")
    for name, values in rates.items():
        spread = f"{median[name]:,.0f} ({min(values):,.0f}-{max(values):,.0f})"
        print(f"{name:26}{spread:>34}{ratios.get(name, ''):>14}")
    print(f"\ntransitions/s over {STAGES} stages: {transitions:,.0f}")
    if as_json:
        headline = {"jobs_per_s": round(median["ours"]), "transitions_per_s": round(transitions)}
        others = {name: round(rate) for name, rate in median.items()}
        print(json.dumps({"bench": "queue", "ratios": ratios, **headline, "jobs_per_s_of": others}))


def _run_contender(url: str, module_name: str, enqueue: str, drain: str, jobs: int) -> None:
    import importlib

    import uvloop

    module = importlib.import_module(f"benchmarks.contenders.{module_name}")

    async def run() -> float:
        await module.setup(url)
        await getattr(module, enqueue)(url, jobs)
        seconds: float = await getattr(module, drain)(url, jobs)
        return seconds

    print(uvloop.run(run()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        _, _, url, module_name, enqueue, drain, jobs = sys.argv
        _run_contender(url, module_name, enqueue, drain, int(jobs))
    else:
        main(sys.argv[1:])
