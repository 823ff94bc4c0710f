"""Search over HTTP: own hits only, and as much around them as was asked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.api.live_service import LiveService, new_user, running_service, service_settings
from tests.search.library import Library
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.text.chunker import ChunkOptions

SECTIONS = ("Roof", "Water", "Storm")
MARKDOWN = "# Policy\n\n" + "\n\n".join(
    f"## {name}\n\n" + "\n\n".join(f"{name} paragraph {i} tells of {name.lower()} in so many words." for i in range(6))
    for name in SECTIONS
)
SMALL = ChunkOptions(target_chars=120, overlap_chars=30, max_bytes=600)


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


@pytest.fixture
def library(service: LiveService, admin: asyncpg.Connection) -> Library:
    return Library(admin, LocalEmbedder())


async def test_a_hit_has_the_fields_of_the_contract_and_is_the_callers(service: LiveService, library: Library) -> None:
    user, other = new_user(), new_user()
    mine = await library.add(user, "mine.md", MARKDOWN, metadata='{"department": "claims"}', page_starts=(0, 200))
    theirs = await library.add(other, "theirs.md", MARKDOWN + "\n\nsecret")
    answer = (await service.client(user).post("/api/v2/search", json={"query": "storm secret", "limit": 100})).json()
    assert answer["took_ms"] > 0
    assert answer["hits"]
    for hit in answer["hits"]:
        assert hit.keys() == {
            "chunk_id",
            "document_id",
            "filename",
            "text",
            "score",
            "heading_path",
            "page",
            "start",
            "end",
            "metadata",
        }
        assert hit["document_id"] == str(mine)
    assert answer["hits"][0]["metadata"] == {"department": "claims"}
    for document in (mine, theirs):
        found = await service.client(other).post(
            "/api/v2/search", json={"query": "storm", "document_ids": [str(document)]}
        )
        assert {hit["document_id"] for hit in found.json()["hits"]} == ({str(theirs)} if document == theirs else set())


async def test_filter_mode_and_limit_reach_the_search(service: LiveService, library: Library) -> None:
    user = new_user()
    await library.add(user, "a.md", "# A\n\nalpha", metadata='{"year": 2025, "tags": ["x", "y"]}')
    await library.add(user, "b.md", "# B\n\nalpha beta", metadata='{"year": 2026}')
    client = service.client(user)

    async def files(**more: Any) -> list[str]:
        answer = await client.post("/api/v2/search", json={"query": "alpha", **more})
        assert answer.status_code == 200, answer.text
        return sorted(hit["filename"] for hit in answer.json()["hits"])

    assert await files() == ["a.md", "b.md"]
    assert await files(filter={"year": 2025}) == ["a.md"]
    assert await files(filter={"tags": ["y"]}) == ["a.md"]
    assert await files(mode="text", query="beta") == ["b.md"]
    assert len(await files(limit=1, mode="vector")) == 1
    assert await files(document_ids=[]) == []


async def test_neighbours_and_section_widen_a_hit_and_repeat_nothing(service: LiveService, library: Library) -> None:
    user = new_user()
    await library.add(user, "policy.md", MARKDOWN, options=SMALL)
    client = service.client(user)

    async def first(expand: str) -> dict[str, Any]:
        asked = {"query": "Water paragraph 3", "mode": "text", "limit": 1, "expand": expand}
        hit: dict[str, Any] = (await client.post("/api/v2/search", json=asked)).json()["hits"][0]
        return hit

    none, neighbours, section = [await first(expand) for expand in ("none", "neighbours", "section")]
    assert none["chunk_id"] == neighbours["chunk_id"] == section["chunk_id"]
    assert none["score"] == neighbours["score"]
    assert neighbours["start"] < none["start"]
    assert neighbours["end"] > none["end"]
    for hit in (neighbours, section):
        assert MARKDOWN[hit["start"] : hit["end"]].strip() in hit["text"]
        assert hit["text"].count("paragraph 3") == 1
    assert all(f"Water paragraph {i}" in section["text"] for i in range(6))
    assert "Storm" not in section["text"]


async def test_a_text_without_headings_has_what_stands_around_as_section(
    service: LiveService, library: Library
) -> None:
    user = new_user()
    text = "\n\n".join(f"Sentence number {i} of a long letter without any heading at all." for i in range(60))
    await library.add(user, "letter.txt", text, options=SMALL)
    asked = {"query": "sentence number 30", "mode": "text", "limit": 1, "expand": "section"}
    hit = (await service.client(user).post("/api/v2/search", json=asked)).json()["hits"][0]
    assert text[hit["start"] : hit["end"]].strip() in hit["text"]
    assert hit["start"] > 0
    assert hit["end"] < len(text)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "query"),
        ({"query": ""}, "query"),
        ({"query": " \n "}, "query"),
        ({"query": "a" * 8001}, "query"),
        ({"query": "a", "limit": 0}, "limit"),
        ({"query": "a", "limit": 101}, "limit"),
        ({"query": "a", "limit": True}, "limit"),
        ({"query": "a", "mode": "magic"}, "mode"),
        ({"query": "a", "expand": "all"}, "expand"),
        ({"query": "a", "filter": []}, "filter"),
        ({"query": "a", "document_ids": ["x"]}, "document_ids.0"),
        ({"query": "a", "user_id": "x"}, "user_id"),
    ],
)
async def test_a_bad_question_is_refused_by_field(service: LiveService, body: dict[str, Any], field: str) -> None:
    answer = await service.client(new_user()).post("/api/v2/search", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["fields"][0]["field"] == field


@pytest.mark.parametrize("body", [{"query": "a\0b"}, {"query": "\ud800"}, {"query": "a", "filter": {"a": "\0"}}])
async def test_what_postgres_cannot_hold_is_refused(service: LiveService, body: dict[str, Any]) -> None:
    answer = await service.client(new_user()).post(
        "/api/v2/search", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
