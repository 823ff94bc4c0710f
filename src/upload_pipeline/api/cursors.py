"""Where a page of a list ended, as an opaque text: the creation time and the id of its last row."""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SHAPE = re.compile(rb"-?[0-9]{1,18}\.[0-9a-f]{32}")


def encode_cursor(created_at: datetime, row_id: UUID) -> str:
    """A text that says where a page ended; safe within a URL.

    Args:
        created_at: of the page's last row; microseconds are kept.
        row_id: its id.
    """
    microseconds = (created_at - _EPOCH) // timedelta(microseconds=1)
    return base64.urlsafe_b64encode(f"{microseconds}.{row_id.hex}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[datetime, UUID]:
    """What `encode_cursor` was given.

    Raises:
        PipelineError: `INVALID_ARGUMENT` where the text is no cursor.
    """
    try:
        plain = base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        if not _SHAPE.fullmatch(plain):
            raise ValueError(cursor)
        microseconds, _, row_id = plain.decode().partition(".")
        return _EPOCH + timedelta(microseconds=int(microseconds)), UUID(row_id)
    except (ValueError, OverflowError, binascii.Error) as error:
        problem = "is not a next_cursor that this service gave out"
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            f"cursor {problem}. Leave it out to begin at the newest.",
            {"fields": [{"field": "cursor", "problem": problem}]},
        ) from error
