"""A browser's anonymous session: asked for, ended, and made part of a user."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import asyncpg
import structlog
from fastapi import APIRouter, Cookie, Request
from pydantic import BaseModel, ConfigDict, Field

from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.limits import batch_bucket, upload_buckets
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.api.same_site import require_same_site
from upload_pipeline.api.session_cookies import COOKIE, drop_cookie, token_sha256
from upload_pipeline.database import queue, sessions
from upload_pipeline.database.deletion import delete_document
from upload_pipeline.database.documents import DeletedDocument
from upload_pipeline.database.rate_limits import Bucket, pour_buckets
from upload_pipeline.database.sessions import Claim
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import Settings
from upload_pipeline.storage.document_objects import remove_document_objects

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/api/ingestion/session", tags=["sessions"])

SessionCookie = Annotated[str | None, Cookie(alias=COOKIE, include_in_schema=False)]

_CLAIM: dict[str, Any] = {
    "moved": 2,
    "duplicates": [
        {
            "document_id": "7d3f0c55-0a4e-5a0f-9a6c-2f8f7c1f4f10",
            "existing_document_id": "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49",
        }
    ],
    "remaining": 0,
}


class CallerSession(BaseModel):
    """As whom the service takes the caller."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"kind": "session", "expires_at": "2026-12-21T09:00:00.000000Z"}]}
    )

    kind: Literal["jwt", "api_key", "session"] = Field(description="By which credentials; `session` by the cookie.")
    expires_at: datetime | None = Field(
        description="When these credentials are over; a session's end moves with its use. Null where they stay good."
    )


class DuplicateDocument(BaseModel):
    """A document of the session whose bytes the user had already."""

    document_id: UUID = Field(description="The session's, which is deleted.")
    existing_document_id: UUID = Field(description="The user's, which stays.")


class ClaimedSession(BaseModel):
    """What became of a session's documents."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CLAIM]})

    moved: int = Field(ge=0, description="Documents that are the user's now, under the ids that they had.")
    duplicates: list[DuplicateDocument] = Field(description="Documents whose bytes the user had already.")
    remaining: int = Field(
        ge=0,
        description="Documents that follow by themselves within minutes, or with the next call: their bytes are the "
        "user's already, and are just being deleted or awaited there.",
    )


@router.post("", summary="Get a session, or see whose caller you are", responses=documented_errors(400, 401, 403, 429))
async def open_session(principal: CurrentPrincipal) -> CallerSession:
    """A browser without credentials gets the cookie `upload_session`. Call this before anything else at the same time.

    A browser is what sends `Origin`, and that must be one of ours. With other credentials nothing is opened.
    """
    expires_at = None if principal.expires_at is None else datetime.fromtimestamp(principal.expires_at, UTC)
    return CallerSession(kind=principal.kind, expires_at=expires_at)


@router.delete("", summary="End the session", status_code=204, responses=documented_errors(400, 401, 403, 429))
async def end_session(
    request: Request, principal: CurrentPrincipal, resources: AppResources, cookie: SessionCookie = None
) -> None:
    """Nobody reaches its documents any more; they are deleted a day later. Without a session: nothing to end."""
    del principal
    known = token_sha256(cookie)
    if known is not None:
        _require_no_other_site(request, resources)
        await sessions.end_session(resources.db, known)
        drop_cookie(request, resources.settings)


@router.post(
    "/claim",
    summary="Make the session's documents yours",
    responses=documented_errors(400, 401, 403, 404, 409, 429),
)
async def claim_session(
    request: Request,
    principal: CurrentPrincipal,
    resources: AppResources,
    correlation_id: CorrelationId,
    cookie: SessionCookie = None,
) -> ClaimedSession:
    """Send the cookie and a user's token or key together; the session is over then.

    What it has used of the daily uploads counts for the user. Safe to repeat: the same user gets the same answer;
    another one 409.
    """
    if principal.kind == "session":
        raise PipelineError(
            ErrorCode.UNAUTHENTICATED,
            "A session is claimed by a user: send `Authorization: Bearer <token>` or `X-API-Key: <key>` beside the "
            "cookie.",
        )
    known = token_sha256(cookie)
    if known is None:
        problem = "is missing or is no session's"
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            f"The cookie {COOKIE} {problem}: there is nothing to claim.",
            {"fields": [{"field": COOKIE, "problem": problem}]},
        )
    _require_no_other_site(request, resources)
    claim = await _claim(resources, known, principal.user_id)
    drop_cookie(request, resources.settings)
    await _remove_duplicates(resources, claim, correlation_id)
    log.info("session_claimed", moved=len(claim.documents), duplicates=len(claim.duplicates), remaining=claim.remaining)
    return ClaimedSession(
        moved=len(claim.documents),
        duplicates=[
            DuplicateDocument(document_id=document, existing_document_id=existing)
            for document, existing in claim.duplicates.items()
        ],
        remaining=claim.remaining,
    )


def _require_no_other_site(request: Request, resources: Resources) -> None:
    """The cookie has a say here beside the other credentials. A program sends no `Origin`, and no page sends theirs."""
    if "Origin" in request.headers:
        require_same_site(request, resources.settings)


def _buckets(settings: Settings, user_id: UUID) -> list[Bucket]:
    return [*upload_buckets(settings, str(user_id)), batch_bucket(settings, str(user_id))]


async def _claim(resources: Resources, known: str, user_id: UUID) -> Claim:
    settings = resources.settings
    try:
        async with resources.db.acquire() as connection, connection.transaction():
            claim = await sessions.claim_session(connection, known, user_id)
            await pour_buckets(
                connection,
                list(
                    zip(
                        _buckets(settings, claim.user_id),
                        _buckets(settings, user_id),
                        strict=True,
                    )
                ),
            )
            return claim
    except asyncpg.PostgresError as error:
        if error.sqlstate == queue.NOT_FOUND:
            raise PipelineError(
                ErrorCode.NOT_FOUND, "There is no such session, or it is over. What you see is all that is yours."
            ) from error
        if error.sqlstate == queue.INVALID_STATE:
            raise PipelineError(
                ErrorCode.INVALID_STATE,
                "This session is another user's since. Upload the files again where you miss them.",
            ) from error
        raise


async def _remove_duplicates(resources: Resources, claim: Claim, correlation_id: str) -> None:
    """Ends the deletions that the claim has begun; where that fails, maintenance does it."""

    async def remove_objects(deleted: DeletedDocument) -> None:
        await remove_document_objects(resources.store, document_id=deleted.document_id, raw_key=deleted.raw_key)

    for document in claim.duplicates:
        try:
            await delete_document(resources.db, document, remove_objects, correlation_id=correlation_id)
        except PipelineError as error:
            log.warning("duplicate_left_for_maintenance", document_id=document, error=str(error))
