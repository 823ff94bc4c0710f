"""A document's graph as text, part by part: JSON, and GraphML (http://graphml.graphdrawing.org/) for graph tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from uuid import UUID

from upload_pipeline.database.document_graph import GraphEdge, GraphNode


@dataclass(frozen=True, slots=True)
class GraphFormat:
    """How a graph is written: opening, nodes, middle, edges, closing.

    Attributes:
        media_type: of the whole.
        opening: what stands before the first node of a document's graph.
        node: one node.
        middle: what stands between the last node and the first edge.
        edge: one edge.
        closing: what stands behind the last edge.
        separator: what stands between two nodes, and between two edges.
    """

    media_type: str
    opening: Callable[[UUID], str]
    node: Callable[[GraphNode], str]
    middle: str
    edge: Callable[[GraphEdge], str]
    closing: str
    separator: str


# What no XML 1.0 document may hold, not even as a reference (section 2.2). Tab and line feed may stand as they are; a
# carriage return would be read back as a line feed.
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_GRAPHML = """<?xml version="1.0" encoding="UTF-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" \
xsi:schemaLocation="http://graphml.graphdrawing.org/xmlns http://graphml.graphdrawing.org/xmlns/1.0/graphml.xsd">
<key id="kind" for="node" attr.name="kind" attr.type="string"/>
<key id="title" for="node" attr.name="title" attr.type="string"/>
<key id="level" for="node" attr.name="level" attr.type="int"/>
<key id="ordinal" for="node" attr.name="ordinal" attr.type="int"/>
<key id="relation" for="edge" attr.name="kind" attr.type="string"/>
"""


def _graphml_opening(document_id: UUID) -> str:
    # An id is an NMTOKEN in graphml.xsd, and a UUID is one.
    return f'{_GRAPHML}<graph id="{document_id}" edgedefault="directed">\n'


def _graphml_node(node: GraphNode) -> str:
    return (
        f'<node id="{node.node_id}"><data key="kind">{node.kind}</data><data key="title">{_xml_text(node.title)}</data>'
        f'<data key="level">{node.level}</data><data key="ordinal">{node.ordinal}</data></node>\n'
    )


def _graphml_edge(edge: GraphEdge) -> str:
    return f'<edge source="{edge.source_id}" target="{edge.target_id}"><data key="relation">{edge.kind}</data></edge>\n'


def _xml_text(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text))


GRAPHML = GraphFormat(
    media_type="application/graphml+xml",
    opening=_graphml_opening,
    node=_graphml_node,
    middle="",
    edge=_graphml_edge,
    closing="</graph>\n</graphml>\n",
    separator="",
)


def _json_node(node: GraphNode) -> str:
    return _json(
        {"id": str(node.node_id), "kind": node.kind, "title": node.title, "level": node.level, "ordinal": node.ordinal}
    )


def _json_edge(edge: GraphEdge) -> str:
    return _json({"source": str(edge.source_id), "target": str(edge.target_id), "kind": edge.kind})


def _json(value: dict[str, str | int]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


JSON = GraphFormat(
    media_type="application/json",
    opening=lambda document_id: f'{{"document_id":"{document_id}","nodes":[',
    node=_json_node,
    middle='],"edges":[',
    edge=_json_edge,
    closing="]}",
    separator=",",
)
