"""The local parser: each file is read in a guarded process on this machine, without network or keys."""

from __future__ import annotations

import os
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from upload_pipeline import media_types
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.guarded_process import GuardedResult, Limits, ProcessGuard
from upload_pipeline.providers.parsing import ParsedMarkdown

_TASKS = "upload_pipeline.providers.local.conversion"
_REVISION = 1
"""Counts up with every change of ours that changes what comes out of the same bytes."""
_ENGINES = ("liteparse", "mammoth", "markdownify", "beautifulsoup4", "lxml", "charset-normalizer")

MAX_MARKDOWN_BYTES = 64 * 1024 * 1024
"""The most Markdown that one file may become."""
_INSPECTION_SECONDS = 20.0
"""The longest that opening a file may take: milliseconds for any that is not made to do harm."""


class LocalParser:
    """Implements `Parser`. One for each process is enough: files are read side by side, each on its own."""

    name = "local"

    def __init__(self, timeout: float, memory_bytes: int) -> None:
        """Sets the limits of one file.

        Args:
            timeout: seconds by the clock.
            memory_bytes: of writable memory.
        """
        self._parse_limits = Limits(timeout, memory_bytes, MAX_MARKDOWN_BYTES)
        self._inspect_limits = Limits(min(timeout, _INSPECTION_SECONDS), memory_bytes, 1024)
        self._guard = ProcessGuard(preload=(_TASKS,))

    @cached_property
    def version(self) -> str:
        """Our revision and the versions of the engines, as in `local@1 liteparse=2.18.0 …`."""
        engines = " ".join(f"{name}={version(name)}" for name in _ENGINES)
        return f"{self.name}@{_REVISION} {engines}"

    async def parse(self, path: Path, media_type: str) -> ParsedMarkdown:
        """Parses one file in a process of its own. See `Parser.parse`.

        Raises:
            PipelineError: `FILE_NOT_FOUND`, `ENCRYPTED`, `CORRUPT_FILE`, `TYPE_MISMATCH`, `UNSUPPORTED_TYPE`,
                `PARSE_FAILED`, `PARSE_TIMEOUT`, `PARSE_MEMORY`, `PARSE_CRASHED`, or `INTERNAL` where no
                process could be had.
        """
        result = await self._run("parse_file", path, media_type, self._parse_limits)
        return ParsedMarkdown(
            result.body.decode("utf-8"),
            result.header["page_count"],
            tuple(result.header["warnings"]),
        )

    async def inspect(self, path: Path, media_type: str) -> None:
        """Opens a file to see that it can be read: not damaged, not encrypted, not without pages.

        Text in any form is not opened; nothing but its content could be wrong with it.

        Raises:
            PipelineError: as `parse`.
        """
        if media_type in (media_types.PDF, media_types.DOCX):
            await self._run("inspect_file", path, media_type, self._inspect_limits)

    def close(self) -> None:
        """Ends the processes that this parser keeps. A later call starts them again."""
        self._guard.close()

    async def _run(self, task: str, path: Path, media_type: str, limits: Limits) -> GuardedResult:
        absolute = os.path.abspath(path)  # noqa: PTH100, ASYNC240 - one stat of a local file
        if not os.path.isfile(absolute):  # noqa: PTH113, ASYNC240
            raise PipelineError(
                ErrorCode.FILE_NOT_FOUND, f"There is no file {str(path)!r} to read.", {"path": str(path)}
            )
        arguments = {"path": absolute, "media_type": media_type}
        return await self._guard.run(f"{_TASKS}:{task}", arguments, limits)
