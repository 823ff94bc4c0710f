"""Service and two workers as processes, two users, both ways of uploading, and nothing left in the end.

All that the users do they do by a client that was made from the service's OpenAPI document; only the bytes that were
announced go by a plain PUT to where the answer says, and the stream of events is read as a browser reads it.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from tests.api.live_service import follow, new_user, token
from tests.scenarios.made_client import made_client, models, operation, types
from tests.scenarios.service_process import service_process
from tests.scenarios.world import World
from upload_pipeline.storage.store_mark import MARK_KEY

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"
SAMPLES = Path(__file__).parents[2] / "samples"


@dataclass(frozen=True)
class Files:
    """Files of two users by the way they go, one of them the same file for both, and words that are in each user's."""

    folder: Path
    ways: dict[str, dict[str, tuple[str, ...]]]
    queries: tuple[str, ...]


OF_THE_CORPUS = Files(
    CORPUS,
    {
        "ours": {
            "multipart": ("policy-cyber-risk.pdf", "blog.html"),
            "announced": ("benefit-options.pdf", "comments.docx"),
        },
        "theirs": {"multipart": ("perks.pdf",), "announced": ("blog.html",)},
    },
    ("cyber risk insurance", "perks and benefits of employees", "blog"),
)
OF_THE_SAMPLES = Files(
    SAMPLES,
    {
        "ours": {
            "multipart": ("homeowners-policy.pdf", "claims-faq.html"),
            "announced": ("homeowners-policy.docx", "inspection-note.txt"),
        },
        "theirs": {"multipart": ("claims-handbook.md",), "announced": ("claims-faq.html",)},
    },
    ("claim", "water damage", "how long does it take"),
)

MEDIA_TYPES = {
    ".pdf": "application/pdf",
    ".html": "text/html",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".txt": "text/plain",
}

TABLES = (
    "documents",
    "upload_jobs",
    "job_outcomes",
    "document_chunks",
    "document_chunk_buffer",
    "document_vector_buffer",
    "document_cached_chunks",
    "document_nodes",
    "document_edges",
)


async def call(tag: str, name: str, client: Any, *arguments: Any, status: int = 200, **named: Any) -> Any:
    """Calls an operation of the made client; its body, once the status is the one expected."""
    answer = await operation(tag, name).asyncio_detailed(*arguments, client=client, **named)
    assert answer.status_code == status, (name, answer.status_code, answer.content[:500])
    assert status == 204 or answer.parsed is not None, (name, answer.content[:500])
    return answer.parsed


async def send(client: Any, path: Path, way: str, *, status: int = 202) -> Any:
    """Uploads a file; what the service says of it."""
    data = path.read_bytes()
    if way == "multipart":
        form = models().UploadForm(file=types().File(payload=BytesIO(data), file_name=path.name))
        return await call("uploads", "upload", client, body=form, status=status)
    announced = models().UploadRequest(
        filename=path.name, bytes_len=len(data), mime=MEDIA_TYPES[path.suffix], sha256=sha256(data).hexdigest()
    )
    made = await call("uploads", "upload", client, body=announced, status=status)
    assert made.upload_method == "PUT"
    async with httpx.AsyncClient() as plain:
        put = await plain.put(made.upload_url, content=data, headers=made.upload_headers.to_dict())
    assert put.is_success, put.text
    return made


@pytest.mark.parametrize(
    "files",
    [
        OF_THE_SAMPLES,
        pytest.param(
            OF_THE_CORPUS, marks=pytest.mark.skipif(not CORPUS.is_dir(), reason=f"the corpus is not here: {CORPUS}")
        ),
    ],
    ids=["samples", "corpus"],
)
async def test_two_users_from_files_to_hits_and_to_nothing_left(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, files: Files
) -> None:
    world = World(database.admin_url, database.worker_url, tmp_path / "home")
    users = {"ours": new_user(), "theirs": new_user()}
    try:
        async with AsyncExitStack() as opened:
            service = opened.enter_context(
                service_process(database.worker_url, world.home, limit_status_reads_per_minute="1000")
            )
            package = opened.enter_context(made_client(service.url, tmp_path / "client"))
            clients = {
                name: await opened.enter_async_context(
                    package.AuthenticatedClient(base_url=service.url, token=token(user), timeout=httpx.Timeout(60))
                )
                for name, user in users.items()
            }
            for _ in range(2):
                world.start_worker()
            made: dict[str, set[UUID]] = {}
            jobs: dict[str, list[UUID]] = {}
            for name, client in clients.items():
                sent = [
                    await send(client, files.folder / filename, way)
                    for way, names in files.ways[name].items()
                    for filename in names
                ]
                made[name] = {answer.document_id for answer in sent}
                jobs[name] = [answer.job_id for answer in sent]
                first = files.folder / files.ways[name]["multipart"][0]
                again = await send(client, first, "multipart", status=200)
                assert (again.duplicate, again.document_id, again.job_id) == (
                    True,
                    sent[0].document_id,
                    sent[0].job_id,
                )
            assert made["ours"].isdisjoint(made["theirs"])
            await asyncio.wait_for(
                asyncio.gather(*(followed(service.url, users[name], job) for name, ids in jobs.items() for job in ids)),
                180,
            )
            for name, client in clients.items():
                await sees_its_own(client, made[name], jobs[name])
                await finds_its_own(client, made[name], files.queries)
                other = "theirs" if name == "ours" else "ours"
                for document in made[other]:
                    await call("documents", "read_document", client, document, status=404)
                    await call("documents", "remove_document", client, document, status=404)
            for name, client in clients.items():
                for document in made[name]:
                    await call("documents", "remove_document", client, document, status=204)
                assert (await call("documents", "list_documents", client)).items == []
                assert (await call("jobs", "list_jobs", client)).items == []
                assert (await call("search", "search_documents", client, body=question("blog"))).hits == []
        for table in TABLES:
            assert await admin.fetchval(f"select count(*) from upload_pipeline.{table}") == 0, table
        left = {path for path in (world.home / "storage").rglob("*") if path.is_file()}
        assert left <= {world.home / "storage" / MARK_KEY}
    finally:
        world.kill_all()


async def followed(url: str, user: UUID, job: UUID) -> None:
    """Follows a job by its stream until it is embedded: each event once, in order."""
    async with httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {token(user)}"}, timeout=120
    ) as client:
        frames = await follow(client, job)
    assert frames[-1].data == {"state": "done"}, [frame.data for frame in frames[-3:]]
    assert frames[-2].data["stage"] == "embedded"
    told = [frame.id for frame in frames[:-1]]
    assert told == sorted(set(told))


async def sees_its_own(client: Any, documents: set[UUID], jobs: list[UUID]) -> None:
    listed = (await call("documents", "list_documents", client)).items
    assert {document.document_id for document in listed} == documents
    assert {job.job_id for job in (await call("jobs", "list_jobs", client)).items} == set(jobs)
    for document in listed:
        job = await call("jobs", "read_job", client, document.job.job_id)
        assert (job.state.value, job.stage, job.progress) == ("done", "embedded", 100)
        chunks = (await call("documents", "list_chunks", client, document.document_id)).items
        text = (
            await operation("documents", "read_markdown").asyncio_detailed(document.document_id, client=client)
        ).content
        assert text.decode()[chunks[0].start : chunks[0].end] == chunks[0].text
        download = await call("documents", "download_document", client, document.document_id)
        async with httpx.AsyncClient() as plain:
            fetched = await plain.get(download.download_url)
        assert fetched.status_code == 200
        assert sha256(fetched.content).hexdigest() == document.file_sha256


async def finds_its_own(client: Any, documents: set[UUID], queries: tuple[str, ...]) -> None:
    for query in queries:
        hits = (await call("search", "search_documents", client, body=question(query))).hits
        assert hits
        assert {hit.document_id for hit in hits} <= documents


def question(query: str) -> Any:
    return models().SearchRequest(query=query, limit=50)
