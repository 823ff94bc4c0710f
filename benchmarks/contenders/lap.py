"""How long a contender took, and how busy the machine was meanwhile: a rate means nothing where others held it back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE = slice(3, 5)  # of a line's figures (proc_stat(5)): idle, and waiting for a disk
_GUESTS = 8  # behind these are shares of the ones before


@dataclass
class Lap:
    """What was measured, once it is over.

    Attributes:
        seconds: by the clock.
        busy: share of all processors' time in which they worked; None where the system does not tell.
    """

    seconds: float = 0.0
    busy: float | None = None


@contextmanager
def measured() -> Iterator[Lap]:
    """Measures what is done in it."""
    lap = Lap()
    before, began = _processor_times(), time.perf_counter()
    yield lap
    lap.seconds = time.perf_counter() - began
    after = _processor_times()
    if before and after:
        spent = [late - early for early, late in zip(before, after, strict=True)]
        lap.busy = 1 - sum(spent[_IDLE]) / max(sum(spent), 1)


def _processor_times() -> list[int]:
    if not _STAT.exists():
        return []
    return [int(figure) for figure in _STAT.read_text().split("\n", 1)[0].split()[1 : _GUESTS + 1]]
