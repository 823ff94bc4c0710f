"""What the caller has uploaded and what became of it: pages with exact totals, of the caller's own only."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from uuid import UUID

import structlog
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upload_pipeline.api.download_urls import download_url
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.jobs import Moment
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.history import HistoryFilter, HistorySort, list_history
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.stages import ShownStatus

if TYPE_CHECKING:
    from upload_pipeline.database.history import HistoryRow

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/api/ingestion", tags=["history"])

MAX_PAGE_SIZE = 100
MAX_PAGE = 1_000_000

Sorting = Literal[
    "uploaded_at", "-uploaded_at", "filename", "-filename", "file_size", "-file_size", "status", "-status"
]

_ITEM: dict[str, Any] = {
    "id": "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49",
    "filename": "homeowners-policy.pdf",
    "file_size": 48213,
    "mime_type": "application/pdf",
    "status": "completed",
    "uploaded_at": "2026-11-21T09:00:00.000000Z",
    "completed_at": "2026-11-21T09:00:07.250000Z",
    "error": None,
    "download_url": "https://api.example.com/api/v2/documents/0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49/bytes?token=…",
}


class HistoryError(BaseModel):
    """Why a file is not through."""

    code: ErrorCode | str = Field(min_length=1, description="Of the closed list of error codes.")
    message: str = Field(min_length=1, description="For a person: what is wrong and what to do.")


class HistoryItem(BaseModel):
    """One upload."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ITEM]})

    id: UUID = Field(description="Of the document.")
    filename: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")]
    file_size: int = Field(gt=0, description="In bytes.")
    mime_type: Annotated[str, Field(max_length=255, pattern=r"^[a-z0-9.+-]+/[a-z0-9.+-]+$")]
    status: ShownStatus = Field(
        description="`pending`: nobody has begun; `processing`; `completed`; `failed`: also where it was cancelled."
    )
    uploaded_at: Moment
    completed_at: Moment | None = Field(description="When its processing ended, well or not; null until then.")
    error: HistoryError | None = Field(description="Of a file that `failed`; null otherwise.")
    download_url: str | None = Field(
        default=None,
        description="By which the bytes are fetched without credentials, for some minutes; null until they have come.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        ended = self.status in (ShownStatus.COMPLETED, ShownStatus.FAILED)
        if self.status is ShownStatus.COMPLETED and self.completed_at is None:
            raise ValueError("completed, and no time of it")
        if self.completed_at is not None and (not ended or self.completed_at < self.uploaded_at):
            raise ValueError("completed_at does not fit")
        if self.error is not None and self.status is not ShownStatus.FAILED:
            raise ValueError("an error of what has not failed")
        return self


class HistoryPage(BaseModel):
    """One page of uploads."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"items": [_ITEM], "page": 1, "page_size": 20, "total": 1}]}
    )

    items: list[HistoryItem]
    page: int
    page_size: int
    total: int = Field(ge=0, description="Uploads on all pages together, exactly.")


@router.get("/history", summary="Your uploads and what became of them", responses=documented_errors(400, 401, 429))
async def list_uploads(
    request: Request,
    principal: CurrentPrincipal,
    resources: AppResources,
    page: Annotated[int, Query(ge=1, le=MAX_PAGE, description="From 1.")] = 1,
    page_size: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE, description="Most uploads of a page.")] = 20,
    uploaded_from: Annotated[
        Moment | None, Query(alias="from", description="Uploaded at this moment or later.")
    ] = None,
    uploaded_to: Annotated[Moment | None, Query(alias="to", description="Uploaded before this moment.")] = None,
    status: Annotated[ShownStatus | None, Query(description="Only those where this is so.")] = None,
    filename: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=255,
            pattern=r"^[^\x00]+$",
            description="A part of the name, in any case; every character stands for itself.",
        ),
    ] = None,
    sort: Annotated[
        Sorting, Query(description="What to order by; with `-` the greatest or newest first.")
    ] = "-uploaded_at",
) -> HistoryPage:
    """Without parameters the newest first. A page behind the last one has no items; `total` is exact on every page."""
    if uploaded_from is not None and uploaded_to is not None and uploaded_from > uploaded_to:
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            "The request does not validate: from: is later than to.",
            {"fields": [{"field": "from", "problem": "is later than to"}]},
        )
    async with as_user(resources.db, principal.user_id) as connection:
        found = await list_history(
            connection,
            HistoryFilter(uploaded_from, uploaded_to, status, filename and unicodedata.normalize("NFC", filename)),
            limit=page_size,
            offset=(page - 1) * page_size,
            sort=HistorySort(sort.removeprefix("-")),
            descending=sort.startswith("-"),
        )
    items = [item for row in found.rows if (item := await _item(request, resources, row)) is not None]
    return HistoryPage(items=items, page=page, page_size=page_size, total=found.total)


async def _item(request: Request, resources: Resources, row: HistoryRow) -> HistoryItem | None:
    """None for a row that does not validate: one bad row is no reason to withhold the others."""
    try:
        item = HistoryItem(
            id=row.document_id,
            filename=row.filename,
            file_size=row.file_bytes,
            mime_type=row.media_type,
            status=ShownStatus(row.status),
            uploaded_at=row.uploaded_at,
            completed_at=row.completed_at,
            error=None
            if row.error_code is None
            else HistoryError(code=row.error_code, message=row.error_message or ""),
        )
        if row.stored:
            item.download_url, _ = await download_url(
                request,
                resources,
                None,
                document_id=row.document_id,
                raw_key=row.raw_key,
                filename=row.filename,
                media_type=row.media_type,
            )
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False)]
    except PipelineError as error:
        if error.code is not ErrorCode.INVALID_KEY:
            raise
        problems = [f"raw_key: {error.message}"]
    else:
        return item
    log.warning("history_row_left_out", document_id=row.document_id, problems=problems)
    return None
