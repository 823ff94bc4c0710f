from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from upload_pipeline.database.connection import connect
from upload_pipeline.database.listening import Listener


async def test_a_listener_that_is_stopped_while_it_proves_itself_ends(database: Any) -> None:
    def stop_soon(*_notification: Any) -> None:
        asyncio.get_running_loop().call_soon(listening.cancel)

    async def opened() -> asyncpg.Connection:
        connection = await connect(database.worker_url)
        await connection.add_listener("a_channel", stop_soon)
        return connection

    listener = Listener(opened, "a_channel", heard=lambda _payload: None)
    listening = asyncio.create_task(listener.run())
    ended, _ = await asyncio.wait([listening], timeout=10)
    assert ended
    with pytest.raises(asyncio.CancelledError):
        await listening
