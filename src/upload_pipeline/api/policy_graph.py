"""The knowledge graph of a document, which is the document's own structure."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.graph_formats import GRAPHML, JSON, GraphFormat
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.document_graph import GraphEdge, GraphNode, graph_version, list_edges, list_nodes
from upload_pipeline.errors import ErrorCode, PipelineError

router = APIRouter(prefix="/api/v1/policies", tags=["policies"])

PAGE = 2000
"""Nodes or edges that one statement reads; some hundred kilobytes of answer."""

_DOCUMENT = "0b2f1c1e-6c0e-5d0a-8f57-0f5d1c2b3a49"
_SECTION = "1e9c2d54-9f0b-5c58-8f0e-6b0f2a7f5d11"
_CHUNK = "5b8f1c0e-26f0-5c3c-9a4e-8d1f6e0c7b21"
_EXAMPLE: dict[str, Any] = {
    "document_id": _DOCUMENT,
    "nodes": [
        {"id": _DOCUMENT, "kind": "document", "title": "home-plus.pdf", "level": 0, "ordinal": 0},
        {"id": _SECTION, "kind": "section", "title": "Deductibles", "level": 1, "ordinal": 0},
        {"id": _CHUNK, "kind": "chunk", "title": "", "level": 2, "ordinal": 0},
    ],
    "edges": [
        {"source": _DOCUMENT, "target": _SECTION, "kind": "contains"},
        {"source": _SECTION, "target": _CHUNK, "kind": "contains"},
    ],
}
_GRAPHML_EXAMPLE = (
    GRAPHML.opening(UUID(_DOCUMENT))
    + GRAPHML.node(GraphNode(UUID(_DOCUMENT), "document", "home-plus.pdf", 0, 0))
    + GRAPHML.node(GraphNode(UUID(_CHUNK), "chunk", "", 1, 0))
    + GRAPHML.edge(GraphEdge(UUID(_DOCUMENT), UUID(_CHUNK), "contains"))
    + GRAPHML.closing
)


class Node(BaseModel):
    """A place in the document."""

    id: UUID = Field(description="The document's, the section's, or the chunk's as in hits of a search.")
    kind: Literal["document", "section", "chunk"]
    title: str = Field(description="The filename, the section's heading; empty for a chunk.")
    level: int = Field(ge=0, description="Depth below the document.")
    ordinal: int = Field(ge=0, description="Of the chunk, or of the first one within, from 0.")


class Edge(BaseModel):
    """A relation of two nodes."""

    source: UUID
    target: UUID
    kind: Literal["contains", "next"] = Field(description="`next` leads from chunk to chunk in reading order.")


class Graph(BaseModel):
    """A document's structure: nodes in reading order, each before what it contains."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    document_id: UUID
    nodes: list[Node]
    edges: list[Edge]


@router.get(
    "/{document_id}/graph",
    summary="The knowledge graph of a document",
    response_model=Graph,
    responses={
        200: {
            "description": "The graph, as JSON or as GraphML.",
            "content": {GRAPHML.media_type: {"schema": {"type": "string"}, "example": _GRAPHML_EXAMPLE}},
        },
        **documented_errors(400, 401, 404, 429),
    },
)
async def read_policy_graph(
    document_id: Annotated[UUID, Path(description="Of a document of yours.", examples=[_DOCUMENT])],
    principal: CurrentPrincipal,
    resources: AppResources,
    format: Annotated[  # noqa: A002 - the parameter's name in the contract
        Literal["json", "graphml"], Query(description="`graphml` for tools that draw and analyse graphs.")
    ] = "json",
) -> Response:
    """Of any document of yours, policy or not; as many nodes and edges as its job's `results` tell.

    Empty until the document is searchable. An answer that breaks off was overtaken by the end of a new processing: ask
    again.
    """
    async with as_user(resources.db, principal.user_id) as connection:
        version = await graph_version(connection, document_id)
    if version is None:
        raise PipelineError(
            ErrorCode.DOCUMENT_NOT_FOUND,
            f"There is no document {document_id}. `GET /api/v2/documents` lists those that there are.",
            {"document_id": str(document_id)},
        )
    written = GRAPHML if format == "graphml" else JSON
    parts = _parts(resources, principal.user_id, document_id, version, written)
    # A database that fails at once fails the request, and not the middle of an answer.
    first = await anext(parts)
    headers = {"Content-Disposition": f'attachment; filename="{document_id}.graphml"'} if written is GRAPHML else None
    return StreamingResponse(_chained(first, parts), media_type=written.media_type, headers=headers)


async def _parts(
    resources: Resources, user_id: UUID, document_id: UUID, version: str, written: GraphFormat
) -> AsyncGenerator[bytes]:
    part = written.opening(document_id)
    node: GraphNode | None = None
    while True:
        async with as_user(resources.db, user_id) as connection:
            nodes = await list_nodes(connection, document_id, version, after=node, limit=PAGE)
        part += (written.separator if node and nodes else "") + written.separator.join(map(written.node, nodes))
        yield part.encode()
        part = ""
        if len(nodes) < PAGE:
            break
        node = nodes[-1]
    part = written.middle
    edge: GraphEdge | None = None
    while True:
        async with as_user(resources.db, user_id) as connection:
            edges = await list_edges(connection, document_id, version, after=edge, limit=PAGE)
        part += (written.separator if edge and edges else "") + written.separator.join(map(written.edge, edges))
        yield part.encode()
        part = ""
        if len(edges) < PAGE:
            break
        edge = edges[-1]
    # A page of another version is empty: only now is it known whether that was the end.
    async with as_user(resources.db, user_id) as connection:
        if await graph_version(connection, document_id) != version:
            raise PipelineError(ErrorCode.INVALID_STATE, f"The graph of document {document_id} was replaced meanwhile.")
    yield written.closing.encode()


async def _chained(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async for part in rest:
        yield part
