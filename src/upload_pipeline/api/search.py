"""Searching the caller's documents."""

from __future__ import annotations

import time
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.resources import AppResources
from upload_pipeline.search.expansion import Expansion, expand_hits
from upload_pipeline.search.query import MAX_QUERY_CHARS, SearchMode, search

router = APIRouter(prefix="/api/v2/search", tags=["search"])

MAX_HITS = 100
MAX_DOCUMENTS = 1000

_QUESTION: dict[str, Any] = {
    "query": "what is the deductible for water damage",
    "limit": 3,
    "filter": {"department": "claims"},
    "mode": "hybrid",
    "expand": "neighbours",
}
_HIT: dict[str, Any] = {
    "chunk_id": "5b8f1c0e-26f0-5c3c-9a4e-8d1f6e0c7b21",
    "document_id": "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49",
    "filename": "homeowners-policy.pdf",
    "text": "## Deductibles\n\nWater damage: 1,500 USD for each loss.",
    "score": 0.2273,
    "heading_path": ["Homeowners policy", "Deductibles"],
    "page": 4,
    "start": 8120,
    "end": 8172,
    "metadata": {"department": "claims"},
}


class SearchRequest(BaseModel):
    """What to look for, and where."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_QUESTION]})

    query: str = Field(min_length=1, max_length=MAX_QUERY_CHARS, pattern=r"\S", description="In words, as to a person.")
    limit: int = Field(default=10, ge=1, le=MAX_HITS, strict=True, description="Most hits.")
    document_ids: Annotated[list[UUID], Field(max_length=MAX_DOCUMENTS)] | None = Field(
        default=None, description="Only in these documents; an empty list finds nothing."
    )
    filter: dict[str, Any] | None = Field(
        default=None, description="Only in documents whose metadata contain this object (JSON containment)."
    )
    mode: SearchMode = Field(
        default=SearchMode.HYBRID, description="By meaning and words together, by meaning, or by words."
    )
    expand: Expansion = Field(
        default=Expansion.NONE,
        description="Widens each hit's text, span and page: by the chunks before and behind it, or by its section.",
    )


class SearchHit(BaseModel):
    """A passage that answers the query."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [_HIT]})

    chunk_id: UUID
    document_id: UUID
    filename: str
    text: str
    score: float = Field(description="The higher the better; only scores of one search compare.")
    heading_path: list[str] = Field(description="Titles of the sections around it, outermost first.")
    page: int | None = Field(description="Where it begins, from 1; null where the format has no pages.")
    start: int = Field(description="First character in the document's Markdown, from 0.")
    end: int = Field(description="One past its last character.")
    metadata: dict[str, Any] = Field(description="The document's.")


class SearchAnswer(BaseModel):
    """The hits, best first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"hits": [_HIT], "took_ms": 8.4}]})

    hits: list[SearchHit]
    took_ms: float = Field(description="Milliseconds from question to answer.")


@router.post("", summary="Search your documents", responses=documented_errors(400, 401, 429))
async def search_documents(
    request: SearchRequest, principal: CurrentPrincipal, resources: AppResources
) -> SearchAnswer:
    """Of your own documents, those that are `embedded`; nobody else's are ever among the hits."""
    started = time.perf_counter()
    found = await search(
        resources.db,
        resources.query_models,
        user_id=principal.user_id,
        query=request.query,
        limit=request.limit,
        mode=request.mode,
        document_ids=request.document_ids,
        metadata_filter=request.filter,
    )
    hits = await expand_hits(resources.db, user_id=principal.user_id, hits=found.hits, expansion=request.expand)
    return SearchAnswer(
        hits=[SearchHit.model_validate(hit) for hit in hits], took_ms=(time.perf_counter() - started) * 1000
    )
