"""A policy from its form to its graph: service, worker and virus scanner as processes of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree

import httpx
import psycopg
import pytest
from clamd_server import INFECTED, clamd_program

from tests.api.live_service import token
from tests.scenarios.service_process import service_process
from tests.scenarios.world import World

ROOT = Path(__file__).parents[2]
SAID = {"insurer": "Acme Mutual", "product_name": "Home Plus", "launch_date": "2026-02-28"}
GRAPHML = {"g": "http://graphml.graphdrawing.org/xmlns"}


@pytest.fixture
def api(database: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A client of a manager, whose service has a worker, and a virus scanner where there is one here."""
    clamd_url = request.getfixturevalue("clamd_url") if clamd_program() else ""
    world = World(database.admin_url, database.worker_url, tmp_path)
    headers = {"Authorization": f"Bearer {token(uuid4(), app_metadata={'roles': ['FP_MANAGER']})}"}
    try:
        with service_process(
            database.worker_url, tmp_path, clamd_url=clamd_url, limit_status_reads_per_minute="1000"
        ) as service:
            world.start_worker()
            with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
                yield client
    finally:
        world.kill_all()


def test_a_policy_becomes_its_graph_and_is_found_by_what_was_said_of_it(api: httpx.Client, database: Any) -> None:
    def count(table: str) -> int:
        with psycopg.connect(database.admin_url) as connection:
            row = connection.execute(f"select count(*) from upload_pipeline.{table}").fetchone()
        return int(row[0]) if row else 0

    data = (ROOT / "samples" / "homeowners-policy.pdf").read_bytes()
    if clamd_program():
        infected = api.post("/api/v1/policies/ingest", files={"file": ("a.pdf", data + INFECTED)}, data=SAID)
        assert (infected.status_code, infected.json()["error"]["code"]) == (400, "MALWARE_FOUND")
        assert count("documents") == 0

    accepted = api.post("/api/v1/policies/ingest", files={"file": ("home plus.pdf", data)}, data=SAID)
    assert accepted.status_code == 202
    told = accepted.json()
    seen, deadline = [told["status"]], time.monotonic() + 120
    while seen[-1] in ("pending", "processing") and time.monotonic() < deadline:
        time.sleep(0.1)
        status = api.get(told["status_url"]).json()
        seen.append(status["status"])
    assert (seen[0], seen[-1]) == ("pending", "completed"), status
    assert (status["progress"], status["results"]["errors"], status["error_message"]) == (100, [], None)

    nodes, edges = count("document_nodes"), count("document_edges")
    assert status["results"] == {"nodes_created": nodes, "edges_created": edges, "errors": []}
    graph_url = f"/api/v1/policies/{told['document_id']}/graph"
    graph = api.get(graph_url).json()
    root = ElementTree.fromstring(api.get(graph_url, params={"format": "graphml"}).content)  # noqa: S314 - our own
    for found in (graph["nodes"], root.findall(".//g:node", GRAPHML)):
        assert len(found) == nodes > 10
    for found in (graph["edges"], root.findall(".//g:edge", GRAPHML)):
        assert len(found) == edges > 10
    kinds = {node["kind"] for node in graph["nodes"]}
    assert kinds == {"document", "section", "chunk"}

    def found_by(filter_: dict[str, str]) -> set[str]:
        answer = api.post("/api/v2/search", json={"query": "water damage", "filter": filter_})
        return {hit["document_id"] for hit in answer.json()["hits"]}

    assert found_by({"insurer": "Acme Mutual", "launch_date": "2026-02-28"}) == {told["document_id"]}
    assert found_by({"insurer": "Somebody else"}) == set()

    again = api.post("/api/v1/policies/ingest", files={"file": ("b.pdf", data)}, data={**SAID, "insurer": "Acme AG"})
    assert (again.status_code, again.json()["status"], again.json()["job_id"]) == (200, "completed", told["job_id"])
    assert found_by({"insurer": "Acme AG"}) == {told["document_id"]}

    assert api.delete(f"/api/v2/documents/{told['document_id']}").status_code in (200, 202, 204)
    for url in (told["status_url"], graph_url):
        assert api.get(url).status_code == 404
    for table in ("policies", "documents", "document_nodes", "document_edges"):
        assert count(table) == 0, table
