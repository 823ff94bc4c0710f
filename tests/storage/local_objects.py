"""Objects on this machine's disk: a key, a source of blocks, and the files that are there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

KEY = "raw/user/document"
FUTURE = datetime.now(UTC) + timedelta(days=1)


async def blocks(count: int, size: int = 524_288) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) * size


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
