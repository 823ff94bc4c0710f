"""What `doctor` looks at of whoever looks at photos."""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

CONNECT_SECONDS = 10.0


async def check_detector(settings: Settings) -> str:
    """Has a vision model look at a small grey picture; of a team's own model, sees that its server takes connections.

    The vision model is asked within the budget, and the usage has what it took. The team's own is sent no message:
    there is no photo for it to answer about.

    Raises:
        PipelineError: what is wrong, and the remedy.
    """
    from upload_pipeline.cli.paid_trials import NoRoomError, try_detector
    from upload_pipeline.providers.detection import DetectionMessage, DetectionRequest
    from upload_pipeline.providers.openai_detector import open_openai_detector
    from upload_pipeline.providers.webhook_detector import open_webhook_detector

    if settings.detector == "webhook":
        webhook = open_webhook_detector(settings)
        try:
            await _connect(webhook.url)
        finally:
            await webhook.close()
        return f"{webhook.url} takes connections; answers go to {settings.api_public_url}"
    message = DetectionMessage(uuid4(), "local:///doctor.jpg", ("damage",), "normal")
    request = DetectionRequest(message, delivery_id=uuid4(), attempt=1, thumbnail=_grey_picture)
    about = f"{settings.detection_model} at {settings.openai_base_url}"
    detector = open_openai_detector(settings)
    try:
        await try_detector(detector, request, settings)
    except NoRoomError as error:
        return f"{about}; {error}"
    finally:
        await detector.close()
    return f"{about} answers"


async def _grey_picture() -> bytes:
    from PIL import Image

    written = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(written, "JPEG")
    return written.getvalue()


async def _connect(url: str) -> None:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except OSError as error:
        raise PipelineError(
            ErrorCode.DETECT_UNAVAILABLE,
            f"{parts.hostname}:{port} takes no connection ({type(error).__name__}). Look at "
            "UPLOAD_PIPELINE_DETECTION_URL, and at the model's server.",
        ) from error
    writer.close()
    await writer.wait_closed()
