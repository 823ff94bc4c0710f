"""Leaving alone for a while what fails: each worker for itself, and longer each time that it fails again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Rest:
    """How long something is left alone."""

    def __init__(self, first: float, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        """There is no rest yet.

        Args:
            first: seconds of the first rest; each one after it is twice as long as the one before.
            longest: seconds that none exceeds.
            clock: seconds that only grow.
        """
        self._first = first
        self._longest = longest
        self._clock = clock
        self._seconds = 0.0  # of the last rest; 0 once it worked again
        self._until = clock()

    @property
    def left(self) -> float:
        """Seconds until it may be tried; 0 where it may be now."""
        return max(0.0, self._until - self._clock())

    def begin(self) -> bool:
        """It failed. False where a rest is on: it failed for several at once, and that counts as one."""
        if self.left:
            return False
        self._seconds = min(2 * self._seconds or self._first, self._longest)
        self._until = self._clock() + self._seconds
        return True

    def end(self) -> None:
        """It worked."""
        self._seconds = 0.0
        self._until = self._clock()
