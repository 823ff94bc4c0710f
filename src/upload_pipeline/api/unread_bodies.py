"""Answers that are given before the whole body has come: the connection ends with them.

The server would otherwise read the rest to the end, however long that is, for the sake of the next request. It must not
close at once either: a close with bytes still coming resets the connection, and a reset can take the answer with it. So
the answer is sent whole, what comes is thrown away for a moment, and then the connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_SECONDS = 1.0
"""How long a sender gets to read the answer and stop."""

KEPT_BYTES = 65536
"""An announced body up to this length is cheaper to read than a connection is to open again."""


class UnreadBodies:
    """Closes the connection after an answer to a request of whose body something may still come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or not _may_be_long(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        ended = closing = False

        async def noting() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start" and not ended:
                closing = True
                MutableHeaders(scope=message)["Connection"] = "close"
            if closing and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while not ended:
                            await noting()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app(scope, noting, sending)


def _may_be_long(headers: Headers) -> bool:
    announced = headers.get("content-length", "")
    if announced.isdecimal():
        return int(announced) > KEPT_BYTES
    return "transfer-encoding" in headers
