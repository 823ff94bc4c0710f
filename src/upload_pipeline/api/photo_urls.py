"""URLs that a photo's bytes are sent and fetched by: the store's own, or this service's where the store signs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import floor
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline.api.public_urls import public_url
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.signed_urls import Grant

if TYPE_CHECKING:
    from fastapi import Request

    from upload_pipeline.api.principals import Principal
    from upload_pipeline.api.resources import Resources
    from upload_pipeline.database.member_photos import MemberPhoto
    from upload_pipeline.intake.photos import PhotoAnnouncement
    from upload_pipeline.storage.objects import SignedUrl


log = structlog.get_logger(__name__)

THUMBNAIL_TYPE = "image/jpeg"


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
    request: Request,
    resources: Resources,
    principal: Principal,
    announced: PhotoAnnouncement,
    *,
    photo_id: UUID,
    raw_key: str,
) -> PhotoTarget:
    """Where the bytes of a photo may be sent, where there is room for them.

    A store that asks its own policies about the caller (Supabase) and refuses gives no URL: then it is this service's,
    which has seen that the caller may.

    Raises:
        PipelineError: `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`, `INSUFFICIENT_STORAGE`.
    """
    seconds = round(resources.settings.upload_url_seconds)
    expires_at = datetime.now(UTC) + timedelta(seconds=seconds)
    await resources.store.require_room(floor=resources.settings.min_free_bytes, expected=announced.file_bytes)
    signed = await _sign_put(resources, announced, raw_key, timedelta(seconds=seconds), principal.token)
    if signed is not None:
        headers = {name.title(): value for name, value in signed.headers.items()}
        earlier = min(expires_at, signed.expires_at or expires_at) - expires_at
        return PhotoTarget(signed.url, headers, seconds + floor(earlier.total_seconds()))
    grant = Grant(
        "PUT",
        photo_id,
        raw_key,
        expires_at,
        file_bytes=announced.file_bytes,
        media_type=announced.media_type,
    )
    return PhotoTarget(_own_url(request, resources, grant), {"Content-Type": announced.media_type}, seconds)


async def _sign_put(
    resources: Resources, announced: PhotoAnnouncement, raw_key: str, life: timedelta, token: str | None
) -> SignedUrl | None:
    try:
        return await resources.store.sign_put(
            raw_key,
            media_type=announced.media_type,
            file_bytes=announced.file_bytes,
            expires_in=life,
            caller_token=token,
        )
    except PipelineError as error:
        if token is None or error.code is not ErrorCode.STORAGE_DENIED:
            raise
        log.warning("caller_refused_by_store", key=raw_key, error=error.message)
        return None


async def thumbnail_url(request: Request, resources: Resources, photo: MemberPhoto) -> str | None:
    """A URL of a photo's thumbnail; None where it has none.

    Raises:
        PipelineError: `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`.
    """
    if photo.thumbnail_key is None:
        return None
    name = f"{photo.file_name.rpartition('.')[0]} thumbnail.jpg"
    return await _sign_get(request, resources, photo, photo.thumbnail_key, name, THUMBNAIL_TYPE)


async def photo_url(request: Request, resources: Resources, photo: MemberPhoto) -> str | None:
    """A URL of a photo's bytes; None before they were looked at, which may be before they tell no place any more.

    Raises:
        PipelineError: `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`.
    """
    if photo.width is None:
        return None
    return await _sign_get(
        request, resources, photo, photo.shared_key or photo.raw_key, photo.file_name, photo.media_type
    )


async def _sign_get(
    request: Request, resources: Resources, photo: MemberPhoto, key: str, file_name: str, media_type: str
) -> str:
    life = timedelta(seconds=round(resources.settings.download_url_seconds))
    signed = await resources.store.sign_get(key, filename=file_name, media_type=media_type, expires_in=life)
    if signed is not None:
        return signed.url
    expires_at = datetime.now(UTC) + life
    grant = Grant("GET", photo.photo_id, key, expires_at, media_type=media_type, filename=file_name)
    return _own_url(request, resources, grant)


def _own_url(request: Request, resources: Resources, grant: Grant) -> str:
    path = f"/api/v1/photos/{grant.document_id}/bytes?token={resources.signer.sign(grant)}"
    return public_url(request, resources.settings, path)
