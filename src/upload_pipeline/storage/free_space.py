"""How much can still be written to a file system of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from upload_pipeline.storage import failures


def free_bytes(directory: Path) -> int:
    """Bytes that are left to this process where the directory lies; a quota does not count.

    Raises:
        OSError: the directory cannot be looked at.
    """
    status = os.statvfs(directory)
    # f_bavail and not f_bfree: what is kept back for root is not ours.
    return status.f_bavail * status.f_frsize


def require_free(directory: Path, *, floor: int, expected: int = 0) -> None:
    """Sees that bytes may still be written below a directory that exists.

    Args:
        directory: where to.
        floor: bytes that must stay free beside what is to come.
        expected: bytes that are to come, as far as that is known.

    Raises:
        PipelineError: `INSUFFICIENT_STORAGE`.
        OSError: the directory cannot be looked at.
    """
    free = free_bytes(directory)
    if free - expected < floor:
        raise failures.no_room(
            f"write {expected} bytes to {directory}", f"{free} bytes are free, and {floor} must stay so", "there"
        )
