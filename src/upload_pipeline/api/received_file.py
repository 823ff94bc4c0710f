"""A form with one file and what its sender says about it, taken in while it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
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

FORM_BYTES = MAX_METADATA_PART + 16 * 1024
"""What a form has beside its file, at most: the metadata, boundaries and headers."""


async def accept_form(
    request: Request, intake: Intake, *, user_id: UUID, correlation_id: str, max_bytes: int, seconds: float
) -> AcceptedDocument:
    """Takes in the file of a form. Nothing is left of one that is refused, breaks off or does not end.

    Args:
        request: whose body is the form: a part `file`, and perhaps a part `metadata`, in any order.
        intake: takes the file.
        user_id: the owner.
        correlation_id: stands on every event and log line that follows.
        max_bytes: largest file.
        seconds: that the whole body may take to come.

    Raises:
        PipelineError: `INVALID_ARGUMENT` or `INVALID_METADATA` naming the part that is wrong; `REQUEST_TIMEOUT`; and
            as `accept_file` does.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes + FORM_BYTES:
        raise PipelineError(
            ErrorCode.FILE_TOO_LARGE,
            f"The body has {int(announced)} bytes, and the limit of a file is {max_bytes}. Send a smaller file.",
            {"max_bytes": max_bytes, "announced_bytes": int(announced)},
        )
    form = MultipartForm(request.headers["content-type"], request.stream(), max_bytes=max_bytes + FORM_BYTES)

    def stage(part: Part) -> AbstractAsyncContextManager[StagedFile]:
        arrival = check_arrival(_filename(part), user_id, {}, correlation_id, 0)
        return stage_stream(intake, chunks=part.chunks(), arrival=arrival, terms=Terms(max_bytes))

    async with AsyncExitStack() as stack:
        async with ending_within(seconds):
            staged, metadata = await _receive(form, stack, stage)
        return await accept_staged(intake, replace(staged, arrival=replace(staged.arrival, metadata=metadata)))


async def _receive(
    form: MultipartForm, stack: AsyncExitStack, stage: Callable[[Part], AbstractAsyncContextManager[StagedFile]]
) -> tuple[StagedFile, dict[str, Any]]:
    staged: StagedFile | None = None
    metadata: dict[str, Any] | None = None
    async with aclosing(form.parts()) as parts:
        async for part in parts:
            if (part.name == "file" and staged) or (part.name == "metadata" and metadata is not None):
                raise invalid_field(part.name, "there is more than one")
            if part.name == "file":
                staged = await stack.enter_async_context(stage(part))
            elif part.name == "metadata":
                metadata = _metadata(await part.read(MAX_METADATA_PART))
            else:
                raise invalid_field(part.name, "there is no such part; the parts are file and metadata")
    if staged is None:
        raise invalid_field("file", "it is missing")
    return staged, metadata or {}


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
