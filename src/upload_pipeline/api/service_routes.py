"""Whether the service is alive."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["service"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    """200 while the event loop turns."""
    return {"status": "ok"}
