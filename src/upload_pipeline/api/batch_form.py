"""The form of a batch, taken in while it comes: files, or an archive of them, and a mapping before or after."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upload_pipeline.api.error_bodies import invalid_field
from upload_pipeline.api.multipart import MultipartForm, Part
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.archive import ArchiveLimits, add_archive, receive_archive
from upload_pipeline.intake.batch_files import MAX_FILES, BatchFiles, too_many_files

if TYPE_CHECKING:
    from starlette.requests import Request

FORM_BYTES = 256 * 1024
"""What a form has beside its files and its mapping, at most: boundaries and headers."""

COUNTED_BYTES = 16 * 1024 * 1024
"""How much is read of files beyond the last that is taken, only to tell how many there are."""


@dataclass(frozen=True, slots=True)
class BatchFormTerms:
    """What the form of a batch may be.

    Attributes:
        max_bytes: of all files together, and so of an archive.
        max_mapping_bytes: of the mapping.
        archive: limits of an archive.
        before_file: asked before each file; what it raises refuses the batch.
    """

    max_bytes: int
    max_mapping_bytes: int
    archive: ArchiveLimits
    before_file: Callable[[], Awaitable[None]]

    @property
    def max_body(self) -> int:
        """Largest body."""
        return self.max_bytes + self.max_mapping_bytes + FORM_BYTES


@dataclass(frozen=True, slots=True)
class ReceivedForm:
    """What came beside the files: the mapping, and what is to be told."""

    mapping: bytes | None
    warnings: tuple[str, ...] = ()


def announced_bytes(request: Request, terms: BatchFormTerms) -> int:
    """The length that a request announces, before its body is read; the most that it may be where it is silent.

    Raises:
        PipelineError: `FILE_TOO_LARGE`.
    """
    announced = request.headers.get("content-length", "")
    if not announced.isdecimal():
        return terms.max_body
    if int(announced) > terms.max_body:
        raise PipelineError(
            ErrorCode.FILE_TOO_LARGE,
            f"The body has {int(announced)} bytes, and a batch at most {terms.max_bytes}. Send it as several batches.",
            {"max_bytes": terms.max_bytes, "announced_bytes": int(announced)},
        )
    return int(announced)


async def receive_batch(request: Request, files: BatchFiles, scratch: Path, terms: BatchFormTerms) -> ReceivedForm:
    """Adds the files of a form to a batch.

    Args:
        request: whose body is the form: parts `files`, or one part `archive`, and perhaps a part `metadata_mapping`.
        files: of the batch.
        scratch: an empty directory of this request's own.
        terms: what is taken.

    Raises:
        PipelineError: `INVALID_ARGUMENT` naming the part that is wrong; `BATCH_TOO_LARGE`, `INVALID_MAPPING`,
            `INVALID_ARCHIVE`; and as `BatchFiles.add_stream` does.
    """
    form = MultipartForm(request.headers["content-type"], request.stream(), max_bytes=terms.max_body)
    mapping: bytes | None = None
    archive = scratch / "archive"
    async with aclosing(form.parts()) as parts:
        async for part in parts:
            if part.name == "metadata_mapping":
                if mapping is not None:
                    raise invalid_field(part.name, "there is more than one")
                mapping = await _mapping(part, terms.max_mapping_bytes)
            elif part.name == "archive":
                if archive.exists() or files.received:
                    raise invalid_field(part.name, "there may be one, and no files beside it")
                await receive_archive(files.intake, part.chunks(), archive, terms.archive)
            elif part.name != "files":
                raise invalid_field(part.name, "there is no such part; the parts are files, archive, metadata_mapping")
            elif archive.exists():
                raise invalid_field(part.name, "there is an archive already; send the files in it, or without it")
            elif files.received == MAX_FILES:
                raise await _counted(parts, part)
            else:
                await terms.before_file()
                await files.add_stream(_filename(part), part.chunks())
    warnings: list[str] = []
    if archive.exists():
        warnings = await add_archive(files, archive, terms.archive, before_file=terms.before_file)
        archive.unlink()
    elif not files.received:
        raise invalid_field("files", "it is missing; send 1 to 100 files, or an archive of them")
    return ReceivedForm(mapping, tuple(warnings))


async def _counted(parts: AsyncGenerator[Part], first: Part) -> PipelineError:
    """The refusal of a batch with too many files, which are counted as far as that costs little."""
    count, size = MAX_FILES, 0
    part: Part | None = first
    while part is not None:
        count += part.name == "files"
        async for chunk in part.chunks():
            size += len(chunk)
            if size > COUNTED_BYTES:
                return too_many_files(count, at_least=True)
        part = await anext(parts, None)
    return too_many_files(count)


async def _mapping(part: Part, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in part.chunks():
        data += chunk
        if len(data) > max_bytes:
            raise PipelineError(
                ErrorCode.INVALID_MAPPING,
                f"The metadata mapping is larger than {max_bytes} bytes. Send only the rows of these files.",
                {"max_bytes": max_bytes},
            )
    return bytes(data)


def _filename(part: Part) -> str:
    if not part.filename:
        raise invalid_field("files", "a file has no name")
    return part.filename
