"""A bound on bodies that are read into memory.

FastAPI's own bound answers without the common error body and without the headers that every answer has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Refuses a body that is too large, by its announced length or as it comes, for routes whose body FastAPI reads.

    A route without a body model reads its body itself, in a stream, and has a bound of its own.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        received = 0

        async def bounded() -> Message:
            nonlocal received
            # Only now: the first thing that is read of a body is read when the route has been found.
            if getattr(scope.get("route"), "body_field", None) is None:
                return await receive()
            if announced.isdecimal() and int(announced) > self._max_bytes:
                raise HTTPException(413)
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, bounded, send)
