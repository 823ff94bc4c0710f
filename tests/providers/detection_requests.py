"""Requests to detectors, for tests of them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from upload_pipeline.providers.detection import DetectionMessage, DetectionRequest

PHOTO = UUID("11111111-2222-4333-8444-555555555555")
IMAGE = b"\xff\xd8\xff\xe0 a photo of a roof"
TYPES = ("damage", "material")


def a_request(image: bytes = IMAGE, types: tuple[str, ...] = TYPES, **changes: Any) -> DetectionRequest:
    """One for a photo with this thumbnail."""

    async def thumbnail() -> bytes:
        return image

    message = DetectionMessage(PHOTO, "s3://photos/p/2026/11/21/1.jpg", types, "normal")
    return DetectionRequest(
        **{"message": message, "delivery_id": PHOTO, "attempt": 1, "thumbnail": thumbnail, **changes}
    )
