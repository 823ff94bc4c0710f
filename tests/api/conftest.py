"""The application on a database of the test's own, called without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from in_process import Api, open_api
from postgres_servers import Database


@pytest.fixture
async def api(database: Database, tmp_path: Path) -> AsyncIterator[Api]:
    """The application with an issuer that shares a secret, and limits that no test meets by accident."""
    async with open_api(database, tmp_path) as opened:
        yield opened
