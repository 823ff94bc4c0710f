"""`scripts/bench embed`: vectors a second that become searchable, against what the embedder gives, and LlamaIndex.

The embedder is a simulator in a process of its own, which answers after 50 ms and spends next to nothing on the vectors
(`tests/simulators/swift_embeddings.py`). The ceiling makes the requests that our worker makes, by the same client, as
many at once, and throws the vectors away. `latency alone` is no contender but a sum: what there would be if sending,
reading and decoding took no time.

`ours` is embedding alone: from stored chunks to searchable ones, on a durable Postgres, with budget, usage and cache.
`ours+chunks` begins one step earlier and stores the chunks too, their words for full-text search included; LlamaIndex
stores texts and vectors, and no words. Each contender runs in a process of its own; repetitions are the outermost loop,
so that a machine that drifts hits all alike.

All share one machine, so each figure comes with how busy its processors were meanwhile. Where some are idle, the
embedder is what is waited for, and the ratio to the ceiling says what our own work costs. Where none is, the figure
says how many vectors a second this machine can store, and the ceiling how many it could have made if it stored none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contenders.embed_texts import BATCH, Race
from benchmarks.contenders.lap import Lap
from tests.simulators.openai_server import KEY
from upload_pipeline.database.embedded import ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = {
    "ceiling": "embed_ceiling",
    "ours": "embed_ours",
    "ours+chunks": "embed_ours_and_chunks",
    "llamaindex": "embed_llamaindex",
}


def main(arguments: list[str]) -> None:
    """Runs the benchmark; with `--json` the last line is one object."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--texts", type=int, default=20_480)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4], help="requests at once, in turn")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that the embedder takes")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=sorted(CONTENDERS), nargs="+", default=list(CONTENDERS))
    options = parser.parse_args(arguments)
    levels = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, _simulator(options.latency) as api_url:
        home = Path(folder)
        database = ensure_embedded(home)
        try:
            apply_migrations(database.admin_url)
            for concurrency in options.concurrency:
                race = Race(database.admin_url, api_url, KEY, options.texts, concurrency)
                levels.append(_report(race, options.latency, _measure(race, options.only, options.repetitions)))
        finally:
            stop_embedded(home)
    if options.json:
        told = {"bench": "embed", "texts": options.texts, "latency": options.latency, "levels": levels}
        print(json.dumps(told))


@contextmanager
def _simulator(latency: float) -> Iterator[str]:
    """A simulator's URL while it serves."""
    command = [sys.executable, "-m", "tests.simulators.swift_embeddings", "--latency", str(latency)]
    command += ["--requests-per-minute", "100000000", "--tokens-per-minute", "100000000000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def _measure(race: Race, names: list[str], repetitions: int) -> dict[str, list[Lap]]:
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    for repetition in range(repetitions):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.embed_bench", "--contender", CONTENDERS[name]]
            command += [race.url, race.api_url, race.api_key, str(race.texts), str(race.concurrency)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            lap = Lap(**json.loads(done.stdout.splitlines()[-1]))
            laps[name].append(lap)
            rate = race.texts / lap.seconds
            print(f"{repetition + 1}/{repetitions}  {name:12} {rate:10,.0f} vectors/s", flush=True)
    return {name: sorted(each, key=lambda lap: lap.seconds) for name, each in laps.items()}


def _report(race: Race, latency: float, laps: dict[str, list[Lap]]) -> dict[str, Any]:
    """Prints a level, and gives it for `--json`: of each contender the repetition in the middle."""
    middle = {name: each[len(each) // 2] for name, each in laps.items()}
    median = {name: race.texts / lap.seconds for name, lap in middle.items()}
    ratios = {
        f"{mine} / {other}": round(median[mine] / median[other], 3)
        for mine, other in (("ours", "ceiling"), ("ours+chunks", "ceiling"), ("ours+chunks", "llamaindex"))
        if mine in median and other in median
    }
    alone = race.concurrency * BATCH / latency
    print(f"\n{race.concurrency} at once{'vectors/s, median (least-most)':>40}{'processors busy':>18}")
    print(f"{'latency alone':14}{f'{alone:,.0f}':>35}")
    for name, each in laps.items():
        spread = f"{median[name]:,.0f} ({race.texts / each[-1].seconds:,.0f}-{race.texts / each[0].seconds:,.0f})"
        busy = middle[name].busy
        print(f"{name:14}{spread:>35}{'unknown' if busy is None else f'{busy:.0%}':>18}")
    print()
    for pair, ratio in ratios.items():
        print(f"{pair:28}{ratio:>8}")
    print(flush=True)
    return {
        "concurrency": race.concurrency,
        "latency_alone": round(alone),
        "ratios": ratios,
        "vectors_per_s": {name: round(rate) for name, rate in median.items()},
        "processors_busy": {name: lap.busy and round(lap.busy, 2) for name, lap in middle.items()},
    }


def _run_contender(module_name: str, url: str, api_url: str, api_key: str, texts: str, concurrency: str) -> None:
    import importlib

    import uvloop

    module = importlib.import_module(f"benchmarks.contenders.{module_name}")
    lap = uvloop.run(module.run(Race(url, api_url, api_key, int(texts), int(concurrency))))
    print(json.dumps(asdict(lap)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        _run_contender(*sys.argv[2:])
    else:
        main(sys.argv[1:])
