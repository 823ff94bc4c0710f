"""Where clients reach this service, for URLs that it hands out."""

from __future__ import annotations

from uuid import UUID

from fastapi import Request

from upload_pipeline.settings import Settings


def public_url(request: Request, settings: Settings, path: str) -> str:
    """The URL of a path: below `API_PUBLIC_URL`, or else below what this request called.

    Args:
        request: the present one; its Host is one of the trusted ones.
        settings: of this process.
        path: begins with a slash, escaped, with its query.
    """
    return (settings.api_public_url or str(request.base_url)).rstrip("/") + path


def status_url(request: Request, settings: Settings, job_id: UUID | None) -> str | None:
    """Where a job tells how far it is; None where there is no job."""
    return None if job_id is None else public_url(request, settings, f"/api/v2/jobs/{job_id}")
