"""What reads photos: something that decodes one, and tells what its EXIF says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


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


class PhotoReader(Protocol):
    """Reads photos: the same bytes give the same facts."""

    @property
    def name(self) -> str:
        """Which reader this is, as metrics name it."""
        ...

    async def read(self, path: Path, media_type: str) -> PhotoFacts:
        """Decodes a photo as a whole, reads its EXIF and makes its thumbnail.

        Args:
            path: a local copy, which is only read.
            media_type: what it was declared to be, JPEG or PNG.

        Raises:
            PipelineError: `FILE_NOT_FOUND`, `TYPE_MISMATCH`, `CORRUPT_IMAGE`, `IMAGE_TOO_LARGE`, `PARSE_TIMEOUT`,
                `PARSE_MEMORY`, `PARSE_CRASHED`, `PARSE_FAILED`, or `INTERNAL` where no process could be had.
        """
        ...

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
        ...
