"""Bounds on bodies as they come: of those that are read into memory the size, of all of them the wait.

FastAPI's own bound answers without the common error body and without the headers that every answer has.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_JSON_BYTES = 1024 * 1024
"""Largest body that is read into memory: requests are small, and uploads are streamed."""


async def read_body(request: Request, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The whole body, for a route that has no body model since it takes several kinds.

    Raises:
        HTTPException: 413.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise HTTPException(413)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise HTTPException(413)
    return bytes(data)


class BodyLimit:
    """Refuses a body that is too large, by its announced length or as it comes, for routes whose body FastAPI reads.

    A route without a body model reads its body itself and has a bound of its own. Any body of which
    nothing comes for `seconds` is given up.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        received = 0
        ended = False

        async def bounded() -> Message:
            nonlocal received, ended
            if ended:  # what comes now is the client's leaving, and may be waited for
                return await receive()
            # Only now: the first thing that is read of a body is read when the route has been found.
            held = getattr(scope.get("route"), "body_field", None) is not None
            if held and announced.isdecimal() and int(announced) > self._max_bytes:
                raise HTTPException(413)
            try:
                async with asyncio.timeout(self._seconds):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408) from error
            ended = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if held and received > self._max_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, bounded, send)
