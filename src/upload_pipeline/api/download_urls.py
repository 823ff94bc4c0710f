"""URLs that a document's bytes are fetched by without credentials, for a few minutes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from fastapi import Request

from upload_pipeline.api.principals import Principal
from upload_pipeline.api.public_urls import public_url
from upload_pipeline.api.resources import Resources
from upload_pipeline.storage.signed_urls import Grant


async def download_url(
    request: Request,
    resources: Resources,
    principal: Principal | None,
    *,
    document_id: UUID,
    raw_key: str,
    filename: str,
    media_type: str,
) -> tuple[str, datetime]:
    """A URL and when it expires: the store's own, or this service's where the store signs none.

    Args:
        request: the present one.
        resources: of this process.
        principal: the caller, for a store that must be asked with their token; None: such a store is not asked, as
            for the many documents of a list.
        document_id: of a document of the caller's.
        raw_key: where its bytes lie.
        filename: that they are saved as.
        media_type: of the bytes.
    """
    life = timedelta(seconds=round(resources.settings.download_url_seconds))
    expires_at = datetime.now(UTC).replace(microsecond=0) + life
    signed = await resources.store.sign_get(
        raw_key,
        filename=filename,
        media_type=media_type,
        expires_in=life,
        caller_token=principal.token_for(raw_key) if principal else None,
    )
    if signed is not None:
        return signed.url, min(expires_at, signed.expires_at or expires_at)
    token = resources.signer.sign(Grant("GET", document_id, raw_key, expires_at))
    return public_url(request, resources.settings, f"/api/v2/documents/{document_id}/bytes?token={token}"), expires_at
