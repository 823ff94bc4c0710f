"""The XML of S3's API, as far as a bucket's configuration needs it: elements with text or children, no attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from lxml import etree

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


@dataclass(frozen=True, slots=True)
class Node:
    """An element; its name is without namespace."""

    name: str
    text: str = ""
    children: tuple[Node, ...] = ()

    def all(self, name: str) -> list[Node]:
        """The children of that name."""
        return [child for child in self.children if child.name == name]

    def value(self, *path: str) -> str:
        """The text at the end of a path of names, the first where there are several; empty where there is none."""
        node = self
        for name in path:
            found = node.all(name)
            if not found:
                return ""
            node = found[0]
        return node.text

    def facts(self) -> frozenset[tuple[str, str]]:
        """What it says, so that two spellings of the same are equal: the paths and texts of its leaves."""
        return frozenset(self._leaves(""))

    def _leaves(self, above: str) -> Iterator[tuple[str, str]]:
        path = f"{above}/{self.name}"
        if self.text:
            yield path, self.text
        for child in self.children:
            yield from child._leaves(path)


def node(name: str, *content: str | int | Node) -> Node:
    """An element of text, or of children."""
    if len(content) == 1 and not isinstance(content[0], Node):
        return Node(name, str(content[0]))
    return Node(name, "", tuple(child for child in content if isinstance(child, Node)))


def render(root: Node) -> bytes:
    """The document."""
    return _rendered(root, f' xmlns="{_NAMESPACE}"').encode()


def parse(data: bytes) -> Node:
    """Reads a document; nothing outside it is fetched and no entity of its own is resolved.

    Raises:
        ValueError: it is no XML, or declares a document type.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"no XML: {error.msg}") from error
    if root.getroottree().docinfo.doctype:
        raise ValueError("a document type is declared")
    return _read(root)


def _read(element: Any) -> Node:
    children = tuple(_read(child) for child in element if isinstance(child.tag, str))
    return Node(etree.QName(element).localname, "" if children else (element.text or "").strip(), children)


def _rendered(root: Node, attributes: str = "") -> str:
    inside = escape(root.text) + "".join(_rendered(child) for child in root.children)
    return f"<{root.name}{attributes}>{inside}</{root.name}>"
