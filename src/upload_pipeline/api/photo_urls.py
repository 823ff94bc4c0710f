"""URLs that a photo's bytes are sent and fetched by: the store's own, or this service's where the store signs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from upload_pipeline.api.public_urls import public_url
from upload_pipeline.storage.signed_urls import Grant

if TYPE_CHECKING:
    from fastapi import Request

    from upload_pipeline.api.resources import Resources
    from upload_pipeline.intake.photos import PhotoAnnouncement


@dataclass(frozen=True, slots=True)
class PhotoTarget:
    """Where a photo's bytes may be sent, by one PUT.

    Attributes:
        url: a permission, so it belongs in no log.
        headers: that the request must have.
        seconds: in which it must have begun.
    """

    url: str = field(repr=False)
    headers: dict[str, str]
    seconds: int


async def sign_photo_target(
    request: Request, resources: Resources, announced: PhotoAnnouncement, *, photo_id: UUID, raw_key: str
) -> PhotoTarget:
    """Where the bytes of a photo may be sent, where there is room for them.

    Raises:
        PipelineError: `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`, `INSUFFICIENT_STORAGE`.
    """
    seconds = round(resources.settings.upload_url_seconds)
    life = timedelta(seconds=seconds)
    await resources.store.require_room(floor=resources.settings.min_free_bytes, expected=announced.file_bytes)
    signed = await resources.store.sign_put(
        raw_key, media_type=announced.media_type, file_bytes=announced.file_bytes, expires_in=life
    )
    if signed is not None:
        return PhotoTarget(signed.url, {name.title(): value for name, value in signed.headers.items()}, seconds)
    grant = Grant(
        "PUT",
        photo_id,
        raw_key,
        datetime.now(UTC) + life,
        file_bytes=announced.file_bytes,
        media_type=announced.media_type,
    )
    return PhotoTarget(_own_url(request, resources, grant), {"Content-Type": announced.media_type}, seconds)


async def thumbnail_url(
    request: Request, resources: Resources, *, photo_id: UUID, key: str | None, file_name: str
) -> str | None:
    """A URL of a photo's thumbnail; None where it has none.

    Raises:
        PipelineError: `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`.
    """
    if key is None:
        return None
    life = timedelta(seconds=round(resources.settings.download_url_seconds))
    name = f"{file_name.rpartition('.')[0] or file_name} thumbnail.jpg"
    signed = await resources.store.sign_get(key, filename=name, media_type="image/jpeg", expires_in=life)
    if signed is not None:
        return signed.url
    grant = Grant("GET", photo_id, key, datetime.now(UTC) + life, media_type="image/jpeg", filename=name)
    return _own_url(request, resources, grant)


def _own_url(request: Request, resources: Resources, grant: Grant) -> str:
    path = f"/api/v1/photos/{grant.document_id}/bytes?token={resources.signer.sign(grant)}"
    return public_url(request, resources.settings, path)
