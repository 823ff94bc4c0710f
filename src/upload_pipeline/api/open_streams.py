"""How many streams of events may be open: each costs memory and a socket for as long as it lasts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import ENV_PREFIX

RETRY_SECONDS = 30
"""What a refusal asks for: nobody knows when a stream ends, and most follow a job that takes seconds."""


class OpenStreams:
    """The open streams of one process, by user.

    Args:
        of_a_user: most streams of one user.
        in_all: most streams of the process.
    """

    def __init__(self, *, of_a_user: int, in_all: int) -> None:
        self._of_a_user = of_a_user
        self._in_all = in_all
        self._open: Counter[UUID] = Counter()

    def __len__(self) -> int:
        """How many are open."""
        return self._open.total()

    @contextmanager
    def opened(self, user_id: UUID) -> Iterator[None]:
        """Counts a stream for as long as the context is open.

        Raises:
            PipelineError: `TOO_MANY_STREAMS`, with what the headers of a 429 say in its details.
        """
        if self._open[user_id] >= self._of_a_user:
            raise _refused(f"{self._of_a_user} streams of yours are open here. Close some, or wait.", self._of_a_user)
        if len(self) >= self._in_all:
            raise _refused(
                f"{self._in_all} streams are open here, and more are not taken. Try again; the operator may raise "
                f"{ENV_PREFIX}SSE_STREAMS or start another process.",
                self._in_all,
            )
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]


def _refused(message: str, limit: int) -> PipelineError:
    return PipelineError(
        ErrorCode.TOO_MANY_STREAMS,
        message,
        {"limit": limit, "remaining": 0, "reset": int(time.time()) + RETRY_SECONDS, "retry_after": RETRY_SECONDS},
    )
