"""How often a user may call: token buckets in Postgres, so that all processes of the service count together."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from fastapi import Request

from upload_pipeline.api.error_bodies import rate_limited
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.request_context import route_of
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database.rate_limits import Bucket, count_open_jobs, take_tokens
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor
    from upload_pipeline.settings import Settings

UPLOAD_ROUTES = frozenset({("POST", "/api/v2/upload"), ("POST", "/api/v1/policies/ingest")})
BATCH_ROUTE = ("POST", "/api/v1/documents/ingest/batch")
PHOTO_ROUTE = ("POST", "/api/v1/photos/upload-url")
STATUS_ROUTES = frozenset({("GET", "/api/v2/jobs/{job_id}"), ("GET", "/api/v1/policies/ingest/status/{job_id}")})

RETRY_ROUTE = ("POST", "/api/v2/jobs/{job_id}/retry")

OPEN_JOBS_RETRY_SECONDS = 60
"""What the cap on open jobs asks for: nobody knows when one ends, and within a minute some usually do."""


async def within_limits(request: Request, principal: CurrentPrincipal, resources: AppResources) -> None:
    """Counts the request; a dependency of every route that has a caller.

    Raises:
        PipelineError: `RATE_LIMITED`, `TOO_MANY_OPEN_JOBS`, with what the headers of a 429 say in its details.
    """
    settings = resources.settings
    route = (request.method, route_of(request.scope))
    buckets = _buckets(settings, route, str(principal.user_id), request.path_params)
    if route in UPLOAD_ROUTES or route in (BATCH_ROUTE, PHOTO_ROUTE, RETRY_ROUTE):
        cap = settings.limit_open_jobs
        if await count_open_jobs(resources.db, principal.user_id, cap) >= cap:
            raise _too_many_open_jobs(cap)
    await take(resources.db, *buckets)


async def within_byte_limits(resources: AppResources, document_id: UUID) -> None:
    """Counts a try to send the bytes of an announced file: its URL is the permission, so there is no caller to count.

    Raises:
        PipelineError: `RATE_LIMITED`.
    """
    limit = resources.settings.limit_upload_tries_per_minute
    await take(resources.db, Bucket(f"upload-bytes:{document_id}", limit, timedelta(minutes=1)))


async def take(db: Executor, *buckets: Bucket) -> None:
    """Takes a token of each bucket, or of none.

    Raises:
        PipelineError: `RATE_LIMITED`, for the bucket that has to be waited for the longest.
    """
    states = await take_tokens(db, buckets)
    refusing = [state for state in states if not state.allowed]
    if refusing:
        raise rate_limited(max(refusing, key=lambda state: state.retry_after))


def upload_buckets(settings: Settings, user: str) -> list[Bucket]:
    """What an upload of a user takes a token from."""
    return [
        Bucket(f"uploads-minute:{user}", settings.limit_uploads_per_minute, timedelta(minutes=1)),
        Bucket(f"uploads-day:{user}", settings.limit_uploads_per_day, timedelta(days=1)),
    ]


def batch_bucket(settings: Settings, user: str) -> Bucket:
    """What each file of a user's batches takes a token from."""
    return Bucket(f"batch-files-day:{user}", settings.limit_batch_files_per_day, timedelta(days=1))


async def require_room_for_jobs(resources: Resources, user_id: UUID, count: int) -> None:
    """Sees that a user may have so many open jobs more.

    Raises:
        PipelineError: `TOO_MANY_OPEN_JOBS`.
    """
    cap = resources.settings.limit_open_jobs
    if await count_open_jobs(resources.db, user_id, cap) + count > cap:
        raise _too_many_open_jobs(cap)


def _buckets(settings: Settings, route: tuple[str, str], user: str, path_params: dict[str, object]) -> list[Bucket]:
    method, path = route
    buckets = [Bucket(f"route:{user}:{method} {path}", settings.limit_requests_per_hour, timedelta(hours=1))]
    if route in UPLOAD_ROUTES:
        buckets.extend(upload_buckets(settings, user))
    elif route == BATCH_ROUTE:
        # One request, and as many files as it has: batch_bucket.
        buckets.append(upload_buckets(settings, user)[0])
    elif route == PHOTO_ROUTE:
        limit = settings.limit_photo_urls_per_minute
        buckets.append(Bucket(f"photo-urls-minute:{user}", limit, timedelta(minutes=1)))
    elif route in STATUS_ROUTES:
        # By user too, so that nobody else can use up the owner's.
        job = _one_spelling(str(path_params["job_id"]))
        buckets.append(Bucket(f"status:{user}:{job}", settings.limit_status_reads_per_minute, timedelta(minutes=1)))
    return buckets


def _one_spelling(job_id: str) -> str:
    """An id as it is counted: a UUID can be written without dashes, in braces, as a URN, and is the same one."""
    try:
        return str(UUID(job_id))
    except ValueError:
        return "none"


def _too_many_open_jobs(cap: int) -> PipelineError:
    return PipelineError(
        ErrorCode.TOO_MANY_OPEN_JOBS,
        f"At most {cap} jobs of yours may be open, and this would be more. Wait until some are done, or cancel some.",
        {
            "limit": cap,
            "remaining": 0,
            "reset": int(datetime.now(UTC).timestamp()) + OPEN_JOBS_RETRY_SECONDS,
            "retry_after": OPEN_JOBS_RETRY_SECONDS,
        },
    )
