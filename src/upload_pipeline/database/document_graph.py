"""A document's structure as its owner reads it: nodes and edges, page by page, each page one statement.

All run on a connection that `as_user` has made the user's, so row-level security decides what there is.

The pages of one reading are statements of transactions of their own, so that no connection is held for as long as a
slow client reads. `version` tells whether they belong together: it is the transaction that has written the graph, which
`commit_embeddings` writes anew as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A place in the document.

    Attributes:
        node_id: the document's id, the chunk's, or a section's own.
        kind: `document`, `section` or `chunk`.
        title: the document's filename, a section's heading; empty for a chunk.
        level: depth below the document, which has 0.
        ordinal: of the first chunk that it holds, from 0.
    """

    node_id: UUID
    kind: str
    title: str
    level: int
    ordinal: int


@dataclass(frozen=True, slots=True)
class GraphEdge:
    """One node `contains` another, or a chunk has another `next` to it."""

    source_id: UUID
    target_id: UUID
    kind: str


async def graph_version(connection: Executor, document_id: UUID) -> str | None:
    """What stands for the graph as it is now: empty while there is none; None where the user has no such document."""
    version: str | None = await connection.fetchval(
        """
        select coalesce(o.xmin::text, '')
          from upload_pipeline.documents d
          left join upload_pipeline.document_outline o on o.node_id = d.document_id
         where d.document_id = $1
        """,
        document_id,
    )
    return version


# A statement sees one state of the tables, so a page is of one version, and tells which.
_VERSION = """
(select d.document_id from upload_pipeline.documents d
   join upload_pipeline.document_outline v on v.node_id = d.document_id
  where d.document_id = $1 and v.xmin::text = $2)
"""

# The bound on the ordinal follows from the place; it is what the indexes know.
_NODES = f"""
select n.node_id, n.kind::text as kind, n.title, n.level::integer as level, n.ordinal
  from {_VERSION} d join upload_pipeline.document_nodes n on n.document_id = d.document_id
 where n.ordinal >= $3 and (n.ordinal, n.level, n.node_id) > ($3, $4, $5)
 order by n.ordinal, n.level, n.node_id
 limit $6
"""  # noqa: S608 - made of a constant

_EDGES = f"""
select e.source_id, e.target_id, e.kind::text as kind
  from {_VERSION} d join upload_pipeline.document_edges e on e.document_id = d.document_id
 where (e.source_id, e.target_id, e.kind::text) > ($3, $4, $5)
 order by e.source_id, e.target_id, e.kind::text
 limit $6
"""  # noqa: S608 - made of a constant


async def list_nodes(
    connection: Executor, document_id: UUID, version: str, *, after: GraphNode | None, limit: int
) -> list[GraphNode]:
    """Nodes in reading order, each before what it contains; none where the graph has another version by now."""
    place = (after.ordinal, after.level, after.node_id) if after else (-1, 0, document_id)
    return [GraphNode(**row) for row in await connection.fetch(_NODES, document_id, version, *place, limit)]


async def list_edges(
    connection: Executor, document_id: UUID, version: str, *, after: GraphEdge | None, limit: int
) -> list[GraphEdge]:
    """Edges in the order of what they connect; none where the graph has another version by now."""
    place = (after.source_id, after.target_id, after.kind) if after else (UUID(int=0), UUID(int=0), "")
    return [GraphEdge(**row) for row in await connection.fetch(_EDGES, document_id, version, *place, limit)]
