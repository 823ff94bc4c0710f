"""A document's graph: what the job has written, for its owner, as JSON and as GraphML that a parser reads back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4, uuid5
from xml.etree import ElementTree

import asyncpg
import httpx
import numpy as np
import pytest
from in_process import Api, token
from issuer import USER

from tests.api.job_rows import TTL, add_job, advance, claim
from upload_pipeline.api import policy_graph
from upload_pipeline.api.app import create_app
from upload_pipeline.database import documents, queue

NS = {"g": "http://graphml.graphdrawing.org/xmlns"}
NASTY = "A & B <c> \"d\" 'e' \x01 \r\n ]]> \ufffe \U0001f600"


async def embed(admin: asyncpg.Connection, job: UUID, paths: list[list[str]]) -> UUID:
    """Leads a job to its end with one chunk for each heading path; its document."""
    await admin.execute("select upload_pipeline.register_model('m3', 'test', 3)")
    claimed = await claim(admin, job)
    await advance(admin, claimed, "chunking")
    document = claimed.document_id
    chunks = [
        {
            "ordinal": ordinal,
            "chunk_id": str(uuid5(document, str(ordinal))),
            "text": "word",
            "chunk_sha256": sha256(b"word").hexdigest(),
            "chunker": "test@1",
            "start_offset": ordinal * 10,
            "end_offset": ordinal * 10 + 4,
            "page_from": None,
            "page_to": None,
            "heading_path": path,
            "section_ids": [str(uuid5(document, json.dumps(path[: depth + 1]))) for depth in range(len(path))],
        }
        for ordinal, path in enumerate(paths)
    ]
    ids = [UUID(str(chunk["chunk_id"])) for chunk in chunks]
    await documents.buffer_chunks(admin, claimed.lease, chunks=chunks, keep=True, ttl=TTL)
    await documents.commit_chunks(admin, claimed.lease, keep=True, ttl=TTL)
    await advance(admin, claimed, "embedding", start="chunked")
    vectors = np.ones((len(ids), 3), dtype=np.float32)
    await documents.buffer_vectors(admin, claimed.lease, model="m3", chunk_ids=ids, embeddings=vectors)
    await advance(admin, claimed, "embeddings_buffered", start="embedding")
    await documents.commit_embeddings(admin, claimed.lease, model="m3", keep=False, ttl=TTL)
    return document


def parsed(answer: httpx.Response) -> ElementTree.Element:
    assert answer.status_code == 200
    return ElementTree.fromstring(answer.content)  # noqa: S314 - our own answer


async def results(admin: asyncpg.Connection, job: UUID) -> tuple[int, int]:
    row = await admin.fetchval("select results from upload_pipeline.job_outcomes where job_id = $1", job)
    told = json.loads(row)
    return told["nodes_created"], told["edges_created"]


async def test_the_graph_is_what_the_job_has_written(api: Api, admin: asyncpg.Connection) -> None:
    job = await add_job(admin, USER, filename="home plus.pdf")
    document = await embed(admin, job, [["A"], ["A", "B"], ["A", "B"], []])
    answer = await api.get(f"/api/v1/policies/{document}/graph")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    graph = answer.json()
    assert graph["document_id"] == str(document)
    assert (len(graph["nodes"]), len(graph["edges"])) == await results(admin, job) == (7, 9)
    section_a, section_b = (str(uuid5(document, json.dumps(path))) for path in (["A"], ["A", "B"]))
    chunks = [str(uuid5(document, str(ordinal))) for ordinal in range(4)]
    assert [(node["id"], node["kind"], node["title"], node["level"], node["ordinal"]) for node in graph["nodes"]] == [
        (str(document), "document", "home plus.pdf", 0, 0),
        (section_a, "section", "A", 1, 0),
        (chunks[0], "chunk", "", 2, 0),
        (section_b, "section", "B", 2, 1),
        (chunks[1], "chunk", "", 3, 1),
        (chunks[2], "chunk", "", 3, 2),
        (chunks[3], "chunk", "", 1, 3),
    ]
    edges = {(edge["source"], edge["target"], edge["kind"]) for edge in graph["edges"]}
    assert edges == {
        (str(document), section_a, "contains"),
        (section_a, chunks[0], "contains"),
        (section_a, section_b, "contains"),
        (section_b, chunks[1], "contains"),
        (section_b, chunks[2], "contains"),
        (str(document), chunks[3], "contains"),
        *((chunks[n], chunks[n + 1], "next") for n in range(3)),
    }
    assert (await api.get(f"/api/v1/policies/{document}/graph?format=json")).json() == graph


async def test_graphml_reads_back_as_the_same_graph_whatever_the_titles_are(
    api: Api, admin: asyncpg.Connection
) -> None:
    document = await embed(admin, await add_job(admin, USER, filename=NASTY), [[NASTY], [NASTY, "B"], ["C"]])
    graph = (await api.get(f"/api/v1/policies/{document}/graph")).json()
    answer = await api.get(f"/api/v1/policies/{document}/graph?format=graphml")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/graphml+xml")
    assert str(document) in answer.headers["content-disposition"]
    root = parsed(answer)
    keys = {key.get("id"): (key.get("for"), key.get("attr.name")) for key in root.findall("g:key", NS)}
    read = root.find("g:graph", NS)
    assert read is not None
    assert (read.get("edgedefault"), read.get("id")) == ("directed", str(document))

    def data(element: ElementTree.Element, of: str) -> dict[str, str]:
        found = {}
        for one in element.findall("g:data", NS):
            key = keys[one.get("key")]
            assert key[0] == of
            found[str(key[1])] = one.text or ""
        return found

    titles = {node["id"]: node["title"] for node in graph["nodes"]}
    assert NASTY in titles.values()
    # the three characters that no XML may hold stand as the replacement character
    expected = {key: title.translate({1: "\ufffd", 13: "\ufffd", 0xFFFE: "\ufffd"}) for key, title in titles.items()}
    nodes = {str(node.get("id")): data(node, "node") for node in read.findall("g:node", NS)}
    assert {key: node["title"] for key, node in nodes.items()} == expected
    assert [(key, node["kind"], int(node["level"]), int(node["ordinal"])) for key, node in nodes.items()] == [
        (node["id"], node["kind"], node["level"], node["ordinal"]) for node in graph["nodes"]
    ]
    assert [
        (edge.get("source"), edge.get("target"), data(edge, "edge")["kind"]) for edge in read.findall("g:edge", NS)
    ] == [(edge["source"], edge["target"], edge["kind"]) for edge in graph["edges"]]


async def test_a_graph_of_several_pages_is_whole_in_both_formats(api: Api, admin: asyncpg.Connection) -> None:
    job = await add_job(admin, USER)
    document = await embed(admin, job, [[f"section {number // 3}"] for number in range(policy_graph.PAGE + 50)])
    nodes, edges = await results(admin, job)
    assert nodes > policy_graph.PAGE
    assert edges > 2 * policy_graph.PAGE
    graph = (await api.get(f"/api/v1/policies/{document}/graph")).json()
    assert len({node["id"] for node in graph["nodes"]}) == len(graph["nodes"]) == nodes
    assert len({tuple(edge.values()) for edge in graph["edges"]}) == len(graph["edges"]) == edges
    order = [(node["ordinal"], node["level"]) for node in graph["nodes"]]
    assert order == sorted(order)
    root = parsed(await api.get(f"/api/v1/policies/{document}/graph?format=graphml"))
    assert (len(root.findall(".//g:node", NS)), len(root.findall(".//g:edge", NS))) == (nodes, edges)


async def test_a_page_may_end_at_any_place(
    api: Api, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a section and the chunk that begins it, too: both have one ordinal."""
    document = await embed(admin, await add_job(admin, USER), [["A"], ["A", "B"], ["A", "B"], []])
    whole = (await api.get(f"/api/v1/policies/{document}/graph")).json()
    monkeypatch.setattr(policy_graph, "PAGE", 1)
    assert (await api.get(f"/api/v1/policies/{document}/graph")).json() == whole


async def test_before_the_document_is_searchable_its_graph_is_empty(api: Api, admin: asyncpg.Connection) -> None:
    job = await add_job(admin, USER)
    document = await admin.fetchval("select document_id from upload_pipeline.upload_jobs where job_id = $1", job)
    assert (await api.get(f"/api/v1/policies/{document}/graph")).json() == {
        "document_id": str(document),
        "nodes": [],
        "edges": [],
    }
    root = parsed(await api.get(f"/api/v1/policies/{document}/graph?format=graphml"))
    assert not root.findall(".//g:node", NS)


async def test_somebody_elses_graph_is_not_there_and_neither_is_a_deleted_ones(
    api: Api, admin: asyncpg.Connection
) -> None:
    document = await embed(admin, await add_job(admin, USER), [["A"]])
    for user, named in ((uuid4(), document), (USER, uuid4())):
        answer = await api.get(f"/api/v1/policies/{named}/graph", user)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "DOCUMENT_NOT_FOUND"
    await documents.begin_deletion(admin, document)
    assert (await api.get(f"/api/v1/policies/{document}/graph")).status_code == 404


@pytest.mark.parametrize("asked", ["format=dot", "format="])
async def test_another_format_is_refused(api: Api, asked: str) -> None:
    answer = await api.get(f"/api/v1/policies/{uuid4()}/graph?{asked}")
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["fields"][0]["field"] == "format"


@dataclass
class HookedPool:
    """A pool that does something before the nth connection is taken."""

    inner: Any
    place: int
    hook: Callable[[], Awaitable[None]]
    taken: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        self.taken += 1
        if self.taken == self.place:
            await self.hook()
        async with self.inner.acquire() as connection:
            yield connection


@pytest.mark.parametrize("place", [2, 3, 4])
async def test_a_graph_that_is_replaced_while_it_is_read_is_never_a_mixture(
    api: Api, admin: asyncpg.Connection, place: int
) -> None:
    """At each of the reading's looks: the answer breaks off, so that a part is not taken for the whole."""
    job = await add_job(admin, USER)
    document = await embed(admin, job, [["A"], ["B"]])

    async def replace_graph() -> None:
        await queue.retry_job(admin, job, from_stage="chunking")
        await embed(admin, job, [["C"], ["D"]])

    pool = HookedPool(api.resources.db, place, replace_graph)
    app = create_app(api.settings, replace(api.resources, db=pool))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    headers = {"Authorization": f"Bearer {token(USER)}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        with pytest.raises(RuntimeError, match="response already started"):
            await client.get(f"/api/v1/policies/{document}/graph")
        assert pool.taken >= place
        titles = {node["title"] for node in (await client.get(f"/api/v1/policies/{document}/graph")).json()["nodes"]}
        assert {"C", "D"} < titles
