"""Bodies of `multipart/form-data`, part by part as they come: nothing is spooled, and no part is held in memory.

The next bytes of a request are read when somebody asks for the next bytes of a part, so a slow store slows the sender
down. What is not exactly a form, from its first boundary to its last, is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from enum import Enum, auto

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from upload_pipeline.api.error_bodies import invalid_field
from upload_pipeline.errors import ErrorCode, PipelineError

MULTIPART = "multipart/form-data"

_PLAIN_ENCODINGS = frozenset({b"", b"7bit", b"8bit", b"binary"})


class _Mark(Enum):
    END_OF_PART = auto()
    END_OF_FORM = auto()


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form.

    Attributes:
        name: of the field.
        filename: as the sender wrote it; None where the part is no file.
    """

    name: str
    filename: str | None
    _form: MultipartForm = field(repr=False)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The part's bytes as they come; to be read before the next part is asked for.

        Raises:
            PipelineError: as `MultipartForm.parts` does.
        """
        while (chunk := await self._form.next_of_part()) is not None:
            yield chunk

    async def read(self, max_bytes: int) -> bytes:
        """The whole part.

        Raises:
            PipelineError: `INVALID_ARGUMENT` naming the part where it is larger; and as `MultipartForm.parts` does.
        """
        data = bytearray()
        async for chunk in self.chunks():
            data += chunk
            if len(data) > max_bytes:
                raise invalid_field(self.name, f"it is larger than {max_bytes} bytes")
        return bytes(data)


class MultipartForm:
    """A form that is being received.

    Args:
        content_type: the request's header, which names the boundary.
        chunks: the request's body.
        max_bytes: largest body.

    Raises:
        PipelineError: `INVALID_ARGUMENT` where the header names no boundary.
    """

    def __init__(self, content_type: str, chunks: AsyncIterator[bytes], *, max_bytes: int) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise invalid_field("Content-Type", "it names no boundary")
        self._chunks = chunks
        self._max_bytes = max_bytes
        self._received = 0
        self._events: deque[Part | bytes | _Mark] = deque()
        self._in_part = False
        self._head: dict[bytes, bytes] = {}
        self._name = bytearray()
        self._value = bytearray()
        # The parser passes over what follows the last boundary, and does not tell where that begins.
        self._closing = b"\r\n--" + boundary + b"--"
        self._tail = b"\r\n"
        callbacks = {
            "on_part_begin": self._head.clear,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise invalid_field("Content-Type", "its boundary is too long") from error

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The parts in their order; what is not read of one is passed over.

        Raises:
            PipelineError: `INVALID_ARGUMENT` where the body is not a form, ends before its last boundary or goes on
                after it; `FILE_TOO_LARGE` where it is larger than allowed; and what the chunks raise.
        """
        while isinstance(event := await self._next(), Part):
            self._in_part = True
            yield event
            while await self.next_of_part() is not None:
                pass
        while (chunk := await self._receive()) is not None:
            _check_epilogue(chunk)

    async def next_of_part(self) -> bytes | None:
        """The next bytes of the part that was given last; None at its end."""
        if self._in_part:
            event = await self._next()
            if isinstance(event, bytes):
                return event
            self._in_part = False
        return None

    async def _next(self) -> Part | bytes | _Mark:
        while not self._events:
            chunk = await self._receive()
            if chunk is None:
                raise invalid_field("body", "it ends before its last boundary")
            self._parse(chunk)
        return self._events.popleft()

    async def _receive(self) -> bytes | None:
        chunk = await anext(self._chunks, None)
        self._received += len(chunk or b"")
        if self._received > self._max_bytes:
            raise PipelineError(
                ErrorCode.FILE_TOO_LARGE,
                f"The body is larger than the {self._max_bytes} bytes that are taken here.",
                {"max_bytes": self._max_bytes},
            )
        return chunk

    def _parse(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise invalid_field("body", f"it is not a form as its Content-Type says ({error})") from error
        if self._events and self._events[-1] is _Mark.END_OF_FORM:
            _check_epilogue((self._tail + chunk).partition(self._closing)[2])
        kept = len(self._closing) - 1
        self._tail = (self._tail + chunk[-kept:])[-kept:]

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._head[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._head.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise invalid_field("body", "a part has no header Content-Disposition: form-data with a name")
        name = _text(options[b"name"])
        if self._head.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
            raise invalid_field(name, "it has a Content-Transfer-Encoding, which forms do not have (RFC 7578, 4.7)")
        filename = options.get(b"filename")
        self._events.append(Part(name, None if filename is None else _text(filename), self))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def _on_part_end(self) -> None:
        self._events.append(_Mark.END_OF_PART)

    def _on_end(self) -> None:
        self._events.append(_Mark.END_OF_FORM)


def _check_epilogue(data: bytes) -> None:
    if data.strip(b"\r\n"):
        raise invalid_field("body", "it goes on after its last boundary")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
