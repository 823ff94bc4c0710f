"""A simulator in a process of its own, for tests whose event loop is busy or that have none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def running_simulator(module: str, *arguments: str) -> Iterator[str]:
    """Its URL, which it prints first, for as long as the context is open."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), f"{module} did not start"
            yield url
        finally:
            process.terminate()
