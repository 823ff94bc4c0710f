"""Reading photos: each in a guarded process on this machine, where a bomb hurts nobody."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.guarded_process import GuardedResult, Limits, ProcessGuard

_TASKS = "upload_pipeline.providers.local.photo_tasks"
_THUMBNAIL_BYTES = 4 * 1024 * 1024
"""More than a JPEG of 512 x 512 pixels can have."""


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """What was read off a photo.

    Attributes:
        width: in pixels, as displayed.
        height: in pixels, as displayed.
        exif: what its EXIF says, by the names that `docs/photos.md` lists; empty where it says nothing.
        warnings: what a person should know about it, in sentences.
        thumbnail: JPEG, upright, without metadata.
    """

    width: int
    height: int
    exif: dict[str, Any]
    warnings: tuple[str, ...]
    thumbnail: bytes


class PhotoReader:
    """Reads photos, several side by side. One for each process is enough."""

    name = "local"

    def __init__(self, timeout: float, memory_bytes: int, max_pixels: int, max_bytes: int) -> None:
        """Sets the limits of one photo.

        Args:
            timeout: seconds by the clock.
            memory_bytes: of writable memory.
            max_pixels: width times height.
            max_bytes: of its file.
        """
        self._read_limits = Limits(timeout, memory_bytes, _THUMBNAIL_BYTES)
        self._write_limits = Limits(timeout, memory_bytes, max_bytes)
        self._max_pixels = max_pixels
        self._guard = ProcessGuard(preload=(_TASKS,))

    async def read(self, path: Path, media_type: str) -> PhotoFacts:
        """Decodes a photo as a whole, reads its EXIF and makes its thumbnail; the same bytes give the same facts.

        Args:
            path: a local copy, which is only read.
            media_type: what it was declared to be, JPEG or PNG.

        Raises:
            PipelineError: `FILE_NOT_FOUND`, `TYPE_MISMATCH`, `CORRUPT_IMAGE`, `IMAGE_TOO_LARGE`, `PARSE_TIMEOUT`,
                `PARSE_MEMORY`, `PARSE_CRASHED`, `PARSE_FAILED`, or `INTERNAL` where no process could be had.
        """
        result = await self._run(
            "read_photo", path, {"media_type": media_type, "max_pixels": self._max_pixels}, self._read_limits
        )
        facts = result.header
        return PhotoFacts(facts["width"], facts["height"], facts["exif"], tuple(facts["warnings"]), result.body)

    async def write_without_place(self, path: Path, media_type: str, target: Path) -> None:
        """Writes a copy of a photo that does not tell where it was taken; the picture stays as it is, bit by bit.

        Of the copy it writes the same bytes again.

        Args:
            path: a local copy, which is only read.
            media_type: what it was declared to be, JPEG or PNG.
            target: the file to write.

        Raises:
            PipelineError: as `read`.
        """
        written = os.path.abspath(target)  # noqa: PTH100, ASYNC240 - looks at no file
        await self._run("write_without_place", path, {"media_type": media_type, "target": written}, self._write_limits)

    def close(self) -> None:
        """Ends the processes that this reader keeps. A later call starts them again."""
        self._guard.close()

    async def _run(self, task: str, path: Path, arguments: dict[str, Any], limits: Limits) -> GuardedResult:
        absolute = os.path.abspath(path)  # noqa: PTH100, ASYNC240 - one stat of a local file
        if not os.path.isfile(absolute):  # noqa: PTH113, ASYNC240
            raise PipelineError(
                ErrorCode.FILE_NOT_FOUND, f"There is no file {str(path)!r} to read.", {"path": str(path)}
            )
        return await self._guard.run(f"{_TASKS}:{task}", {"path": absolute} | arguments, limits)
