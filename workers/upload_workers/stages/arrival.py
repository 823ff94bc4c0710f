"""Bytes that come to the store by themselves: how long they are waited for, and the scanner that sees them here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import structlog

from upload_pipeline.database.documents import AwaitedBytes
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_workers.steps import Snooze, StepContext

log = structlog.get_logger(__name__)

SHORTEST_WAIT = timedelta(seconds=1)
LONGEST_WAIT = timedelta(seconds=30)
"""Between two looks for bytes that are announced; the wait grows with the time that they have been awaited."""


def not_there(filename: str, awaited: AwaitedBytes) -> Snooze:
    """Waits on.

    Raises:
        PipelineError: `UPLOAD_EXPIRED` past the deadline.
    """
    if awaited.left <= timedelta(0):
        raise PipelineError(
            ErrorCode.UPLOAD_EXPIRED,
            f"The bytes of {filename!r} did not come until {awaited.deadline:%Y-%m-%d %H:%M:%S} UTC. "
            "Announce the file again, and send its bytes to the new URL.",
            {"deadline": awaited.deadline.isoformat()},
        )
    return not_yet(awaited)


def not_yet(awaited: AwaitedBytes) -> Snooze:
    """Looks again later, the later the longer the bytes have been awaited."""
    delay = min(max(awaited.waited / 2, SHORTEST_WAIT), LONGEST_WAIT)
    # The last look is the one at the deadline.
    return Snooze(min(delay, max(awaited.left, SHORTEST_WAIT)))


async def show_to_scanner(filename: str, key: str, blocks: AsyncIterator[bytes], context: StepContext) -> None:
    """Passes an object's bytes by the scanner, if there is one; an infected one is removed.

    Raises:
        PipelineError: `MALWARE_FOUND`, `SCANNER_UNAVAILABLE`; and as whoever gives the bytes does.
    """
    if context.scanner is None:
        return
    try:
        async with context.scanner.scan(filename) as scan:
            async for _ in scan.passing(blocks):
                pass
            await scan.verdict()
    except PipelineError as error:
        if error.code is ErrorCode.MALWARE_FOUND:
            log.warning("malware_found", filename=filename, signature=error.details["signature"])
            await context.store.delete([key])
        raise
