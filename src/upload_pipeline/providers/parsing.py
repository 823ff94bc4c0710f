"""What a parser is: something that turns a file into Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ParsedMarkdown:
    """What a parser made of a file.

    Attributes:
        markdown: the text as Markdown. Pages, where the format has them, are separated by U+000C, so a file
            of n pages holds n - 1 of them.
        page_count: how many pages the file has; None where the format has none.
        warnings: what a person should know about the result, in sentences.
    """

    markdown: str
    page_count: int | None
    warnings: tuple[str, ...] = ()


class Parser(Protocol):
    """Turns files into Markdown: the same bytes under the same name and version give the same Markdown."""

    @property
    def name(self) -> str:
        """Which parser this is, as settings name it."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same bytes may give another result."""
        ...

    async def parse(self, path: Path, media_type: str) -> ParsedMarkdown:
        """Parses one file.

        Args:
            path: a local copy of the file, which is only read.
            media_type: what the file is, one of `media_types.MEDIA_TYPES`.

        Raises:
            PipelineError: `ENCRYPTED`, `CORRUPT_FILE`, `UNSUPPORTED_TYPE` or one of the `PARSE_` codes.
        """
        ...

    async def inspect(self, path: Path, media_type: str) -> None:
        """Opens a file to see that it can be read, at a small part of what parsing it costs.

        Raises:
            PipelineError: as `parse`.
        """
        ...
