"""What a photo may be: the two formats, and how each is told by its first bytes."""

from __future__ import annotations

from typing import Final

from upload_pipeline.errors import ErrorCode, PipelineError

JPEG: Final = "image/jpeg"
PNG: Final = "image/png"

SIGNATURES: Final = {JPEG: b"\xff\xd8\xff", PNG: b"\x89PNG\r\n\x1a\n"}
"""How files begin: ITU-T T.81 B.1.1.3 (SOI, then any marker), PNG (third edition) section 5.2."""


_SPOKEN: Final = {JPEG: "a JPEG", PNG: "a PNG", None: "neither JPEG nor PNG"}


def check_photo_type(head: bytes, media_type: str) -> None:
    """Sees that a file is what it was declared to be, by its first bytes.

    Args:
        head: eight bytes or more, or all that there are.
        media_type: JPEG or PNG.

    Raises:
        PipelineError: `TYPE_MISMATCH`.
    """
    found = next((kind for kind, start in SIGNATURES.items() if head.startswith(start)), None)
    if found != media_type:
        raise PipelineError(
            ErrorCode.TYPE_MISMATCH,
            f"The file was declared as {media_type} but its content is {_SPOKEN[found]}. Ask for another upload "
            "URL with the type that it has, or send the photo that was meant.",
            {"expected": media_type, "found": found},
        )
