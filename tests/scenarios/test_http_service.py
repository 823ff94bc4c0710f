"""The service and two workers as processes of their own, two users, from files to hits and to nothing left."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from tests.api.live_service import follow, new_user, token
from tests.scenarios.service_process import service_process
from tests.scenarios.world import World
from upload_pipeline.database import documents
from upload_pipeline.storage.document_objects import remove_document_objects
from upload_pipeline.storage.store import open_store

FILES = {
    "ours": ("policy-cyber-risk.pdf", "benefit-options.pdf", "blog.html", "comments.docx"),
    "theirs": ("perks.pdf", "blog.html"),
}
"""Files of the corpus of two users; one of them both have."""

TABLES = (
    "documents",
    "upload_jobs",
    "job_outcomes",
    "document_chunks",
    "document_chunk_buffer",
    "document_nodes",
    "document_edges",
)


async def test_two_users_follow_search_and_leave_nothing(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, corpus: Path
) -> None:
    world = World(database.admin_url, database.worker_url, tmp_path / "home")
    users = {"ours": new_user(), "theirs": new_user()}
    try:
        with service_process(database.worker_url, world.home) as service:
            clients = {
                name: httpx.AsyncClient(
                    base_url=service.url, headers={"Authorization": f"Bearer {token(user)}"}, timeout=60
                )
                for name, user in users.items()
            }
            made: dict[str, set[str]] = {}
            following: dict[str, list[asyncio.Task[Any]]] = {}
            for name, client in clients.items():
                ids = await world.ingest([(corpus / filename, users[name]) for filename in FILES[name]])
                made[name] = {str(document) for document in ids}
                jobs = (await client.get("/api/v2/jobs")).json()["items"]
                assert {job["document_id"] for job in jobs} == made[name]
                following[name] = [asyncio.create_task(follow(client, job["job_id"])) for job in jobs]
            assert made["ours"].isdisjoint(made["theirs"])
            for _ in range(2):
                world.start_worker()
            for name in users:
                for frames in await asyncio.wait_for(asyncio.gather(*following[name]), 180):
                    assert frames[-1].data == {"state": "done"}, [frame.data for frame in frames[-3:]]
                    assert frames[-2].data["stage"] == "embedded"
                    ids_told = [frame.id for frame in frames[:-1]]
                    assert ids_told == sorted(set(ids_told))
            for name, client in clients.items():
                for query in ("cyber risk insurance", "perks and benefits of employees", "blog"):
                    answer = await client.post("/api/v2/search", json={"query": query, "limit": 50})
                    found = {hit["document_id"] for hit in answer.json()["hits"]}
                    assert found
                    assert found <= made[name]
            store = open_store(world.settings.effective_storage_url)
            for row in await admin.fetch("select document_id from upload_pipeline.documents"):
                begun = await documents.begin_deletion(admin, row["document_id"])
                assert begun is not None
                await remove_document_objects(store, document_id=begun.document_id, raw_key=begun.raw_key)
                assert await documents.finish_deletion(admin, row["document_id"])
            for client in clients.values():
                assert (await client.get("/api/v2/jobs")).json()["items"] == []
                assert (await client.post("/api/v2/search", json={"query": "blog"})).json()["hits"] == []
                await client.aclose()
        for table in TABLES:
            assert await admin.fetchval(f"select count(*) from upload_pipeline.{table}") == 0, table
        assert [path for path in (world.home / "storage").rglob("*") if path.is_file()] == []
    finally:
        world.kill_all()
