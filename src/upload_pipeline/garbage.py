"""Garbage collection in a process that works for long: over what is new, and less often than Python does by itself.

What is freed by its reference count, which is nearly all, is not concerned. Python looks for cycles whenever 700 more
objects were made than freed, and a worker with many jobs under way has more than that alive at any moment: to go
through the same tasks and rows again and again took nearly a third of its time in `scripts/bench queue`. What is there
when work begins (modules, classes, settings) stays, and is not looked at again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 10_000
"""More objects made than freed, after which the new ones are looked through; some MB where each is in a cycle."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Sets the collector of this process so while entered, and back as it was afterwards."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
