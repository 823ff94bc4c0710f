"""A form with one file and what its sender says about it, taken in while it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from upload_pipeline.api.error_bodies import invalid_field
from upload_pipeline.api.multipart import MultipartForm, Part
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_staged
from upload_pipeline.intake.arrival import check_arrival
from upload_pipeline.intake.metadata import MAX_METADATA_BYTES, check_metadata
from upload_pipeline.intake.staging import Intake, StagedFile, Terms, stage_stream

if TYPE_CHECKING:
    from uuid import UUID

    from starlette.requests import Request

    from upload_pipeline.database.documents import AcceptedDocument

MAX_METADATA_PART = 4 * MAX_METADATA_BYTES
"""The same metadata are longer where each character is escaped."""

HEADERS_BYTES = 16 * 1024
"""What a form has beside its parts, at most: boundaries and headers."""


@dataclass(frozen=True, slots=True)
class FormField:
    """A part beside the file.

    Attributes:
        max_bytes: its limit.
        read: makes a value of its bytes; raises `PipelineError` naming the field.
    """

    max_bytes: int
    read: Callable[[bytes], Any]


@dataclass(frozen=True, slots=True)
class ReceivedForm:
    """A form that has come whole.

    Attributes:
        staged: the file; metadata are still to be given to its arrival.
        values: of the fields that the form has, by name.
    """

    staged: StagedFile
    values: Mapping[str, Any]


async def accept_form(
    request: Request, intake: Intake, *, user_id: UUID, correlation_id: str, max_bytes: int, seconds: float
) -> AcceptedDocument:
    """Takes in the file of a form, with its metadata where there is a part `metadata`; otherwise as `receive_form`.

    Raises:
        PipelineError: `INVALID_METADATA`; and as `receive_form` and `accept_file` do.
    """
    async with receive_form(
        request,
        intake,
        user_id=user_id,
        correlation_id=correlation_id,
        terms=Terms(max_bytes),
        fields={"metadata": FormField(MAX_METADATA_PART, _metadata)},
        seconds=seconds,
    ) as form:
        arrival = replace(form.staged.arrival, metadata=form.values.get("metadata", {}))
        return await accept_staged(intake, replace(form.staged, arrival=arrival))


@asynccontextmanager
async def receive_form(
    request: Request,
    intake: Intake,
    *,
    user_id: UUID,
    correlation_id: str,
    terms: Terms,
    fields: Mapping[str, FormField],
    seconds: float,
) -> AsyncGenerator[ReceivedForm]:
    """Stages the file of a form while it comes. Nothing is left of one that is refused, breaks off or does not end.

    Left by an exception, the file is removed; left otherwise it is the caller's, as `stage_stream` has it.

    Args:
        request: whose body is the form: a part `file` and perhaps some of the fields, in any order, each once.
        intake: takes the file.
        user_id: the owner.
        correlation_id: stands on every event and log line that follows.
        terms: what files are taken.
        fields: what else the form may have, by name.
        seconds: that the whole body may take to come.

    Raises:
        PipelineError: `INVALID_ARGUMENT` naming the part that is wrong; `REQUEST_TIMEOUT`; what a field's `read`
            raises; and as `stage_stream` does.
    """
    beside = sum(field.max_bytes for field in fields.values()) + HEADERS_BYTES
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > terms.max_bytes + beside:
        raise PipelineError(
            ErrorCode.FILE_TOO_LARGE,
            f"The body has {int(announced)} bytes, and the limit of a file is {terms.max_bytes}. Send a smaller file.",
            {"max_bytes": terms.max_bytes, "announced_bytes": int(announced)},
        )
    form = MultipartForm(request.headers["content-type"], request.stream(), max_bytes=terms.max_bytes + beside)

    def stage(part: Part) -> AbstractAsyncContextManager[StagedFile]:
        arrival = check_arrival(_filename(part), user_id, {}, correlation_id, 0)
        return stage_stream(intake, chunks=part.chunks(), arrival=arrival, terms=terms)

    async with AsyncExitStack() as stack:
        async with ending_within(seconds):
            received = await _receive(form, stack, stage, fields)
        yield received


async def _receive(
    form: MultipartForm,
    stack: AsyncExitStack,
    stage: Callable[[Part], AbstractAsyncContextManager[StagedFile]],
    fields: Mapping[str, FormField],
) -> ReceivedForm:
    staged: StagedFile | None = None
    values: dict[str, Any] = {}
    async with aclosing(form.parts()) as parts:
        async for part in parts:
            if (part.name == "file" and staged) or part.name in values:
                raise invalid_field(part.name, "there is more than one")
            if part.name == "file":
                staged = await stack.enter_async_context(stage(part))
            elif (field := fields.get(part.name)) is not None:
                values[part.name] = field.read(await part.read(field.max_bytes))
            else:
                known = ", ".join(("file", *fields))
                raise invalid_field(part.name, f"there is no such part; the parts are {known}")
    if staged is None:
        raise invalid_field("file", "it is missing")
    return ReceivedForm(staged, values)


@asynccontextmanager
async def ending_within(seconds: float) -> AsyncGenerator[None]:
    """Bounds the receiving of a body that goes on, however slowly.

    Raises:
        PipelineError: `REQUEST_TIMEOUT`.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise PipelineError(
            ErrorCode.REQUEST_TIMEOUT,
            f"The body did not end within {seconds:g} s. Send it again over a faster connection.",
            {"seconds": seconds},
        ) from error


def named_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Checked metadata; an error names the field.

    Raises:
        PipelineError: `INVALID_METADATA`.
    """
    try:
        return check_metadata(metadata)
    except PipelineError as error:
        name = f"metadata.{error.details['key']}" if "key" in error.details else "metadata"
        fields = [{"field": name, "problem": error.message}]
        raise PipelineError(error.code, error.message, {**error.details, "fields": fields}) from error


def _filename(part: Part) -> str:
    if not part.filename:
        raise invalid_field("file", "it has no file name")
    return part.filename


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise invalid_field("metadata", f"it is not JSON ({reason})", ErrorCode.INVALID_METADATA) from error
    if not isinstance(metadata, dict):
        raise invalid_field("metadata", "it is not a JSON object", ErrorCode.INVALID_METADATA)
    return named_metadata(metadata)
