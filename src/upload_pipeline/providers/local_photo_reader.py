"""The reader of photos on this machine: each in a guarded process, where a bomb hurts nobody."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.guarded_process import Limits, ProcessGuard
from upload_pipeline.providers.photo_reading import PhotoFacts

_TASKS = "upload_pipeline.providers.local.photo_tasks"
_THUMBNAIL_BYTES = 4 * 1024 * 1024
"""More than a JPEG of 512 x 512 pixels can have."""


class LocalPhotoReader:
    """Implements `PhotoReader`. One for each process is enough: photos are read side by side."""

    name = "local"

    def __init__(self, timeout: float, memory_bytes: int, max_pixels: int) -> None:
        """Sets the limits of one photo.

        Args:
            timeout: seconds by the clock.
            memory_bytes: of writable memory.
            max_pixels: width times height.
        """
        self._limits = Limits(timeout, memory_bytes, _THUMBNAIL_BYTES)
        self._max_pixels = max_pixels
        self._guard = ProcessGuard(preload=(_TASKS,))

    async def read(self, path: Path, media_type: str) -> PhotoFacts:
        """As `PhotoReader.read`."""
        absolute, _ = _found(path)
        arguments = {"path": absolute, "media_type": media_type, "max_pixels": self._max_pixels}
        result = await self._guard.run(f"{_TASKS}:read_photo", arguments, self._limits)
        facts = result.header
        return PhotoFacts(facts["width"], facts["height"], facts["exif"], tuple(facts["warnings"]), result.body)

    async def write_without_place(self, path: Path, media_type: str, target: Path) -> None:
        """As `PhotoReader.write_without_place`."""
        absolute, size = _found(path)
        written = os.path.abspath(target)  # noqa: PTH100, ASYNC240 - looks at no file
        arguments = {"path": absolute, "media_type": media_type, "target": written}
        # The limit holds for every file that the task writes; a copy is at most a few bytes longer than the photo.
        limits = replace(self._limits, output_bytes=size + _THUMBNAIL_BYTES)
        await self._guard.run(f"{_TASKS}:write_without_place", arguments, limits)

    def close(self) -> None:
        """Ends the processes that this reader keeps. A later call starts them again."""
        self._guard.close()


def _found(path: Path) -> tuple[str, int]:
    """The file's whole name, since tasks run in folders of their own, and its size."""
    absolute = os.path.abspath(path)  # noqa: PTH100 - one stat of a local file
    try:
        return absolute, os.path.getsize(absolute)  # noqa: PTH202
    except OSError as error:
        raise PipelineError(
            ErrorCode.FILE_NOT_FOUND, f"There is no file {str(path)!r} to read.", {"path": str(path)}
        ) from error
