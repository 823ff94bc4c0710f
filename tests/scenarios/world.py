"""A small world to run scenarios in: a database, a home, worker processes, and the rows that came out."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from tests.sample_documents import make_document
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.intake.accept import accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.settings import Settings, load_settings
from upload_pipeline.storage.store import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS = ("pdf", "docx", "txt", "md", "html")

RESULT_QUERIES = {
    "documents": """
        select document_id, user_id, filename, markdown_sha256, page_count, page_starts, chunk_count, parser, chunker,
               embed_model, searchable_at is not null as searchable
          from upload_pipeline.documents order by document_id""",
    "chunks": """
        select chunk_id, document_id, user_id, ordinal, text, chunk_sha256, start_offset, end_offset, page_from,
               page_to, heading_path, section_ids, embed_model, embedding::text as embedding, live
          from upload_pipeline.document_chunks order by chunk_id""",
    "nodes": "select * from upload_pipeline.document_nodes order by node_id",
    "edges": "select * from upload_pipeline.document_edges order by source_id, kind, target_id",
    "buffers": """
        select (select count(*) from upload_pipeline.document_chunk_buffer)
             + (select count(*) from upload_pipeline.document_vector_buffer)
             + (select count(*) from upload_pipeline.document_cached_chunks) as left_over""",
}
"""What a run leaves that a reader can see; equal inputs must leave equal rows, however the run went."""


@dataclass
class World:
    """A database that is migrated, and a home of its own."""

    admin_url: str
    worker_url: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        """Settings of this process for this world."""
        return load_settings(home=self.home, database_url=self.worker_url)

    async def ingest(self, files: Iterable[tuple[Path, UUID]]) -> list[UUID]:
        """Takes files in for users; returns the documents' ids, in order."""
        settings = self.settings
        scratch = self.home / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        parser = LocalParser(settings.parse_timeout, settings.parse_memory_bytes)
        pool = await open_pool(self.worker_url, connection_options(settings))
        try:
            intake = Intake(
                db=pool,
                store=open_store(settings.effective_storage_url),
                inspect=parser.inspect,
                max_bytes=settings.max_file_bytes,
                scratch=scratch,
            )
            return [
                (await accept_path(intake, path=path, user_id=user, metadata={}, correlation_id="world")).document_id
                for path, user in files
            ]
        finally:
            parser.close()
            await pool.close()

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Starts a worker process; its log goes to a file under the home."""
        environment = {
            **os.environ,
            "UPLOAD_PIPELINE_HOME": str(self.home),
            "UPLOAD_PIPELINE_DATABASE_URL": self.worker_url,
            **self.environment,
        }
        log_path = self.home / f"worker-{len(self.workers)}.log"
        with log_path.open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "upload_workers"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.workers.append(worker)
        return worker

    def kill_all(self) -> None:
        """Ends every worker that still runs, as hard as it goes."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            worker.wait()

    async def until_ended(self, seconds: float) -> dict[str, int]:
        """Waits until no job is live, at most so long; returns how many jobs ended in which state."""
        connection = await asyncpg.connect(self.admin_url)
        try:
            async with asyncio.timeout(seconds):
                while await live_jobs(connection):
                    await asyncio.sleep(0.1)
            rows = await connection.fetch("select state, count(*) as n from upload_pipeline.upload_jobs group by state")
            return {row["state"]: row["n"] for row in rows}
        finally:
            await connection.close()

    async def results(self) -> dict[str, list[dict[str, Any]]]:
        """The rows that readers can see; see `RESULT_QUERIES`."""
        connection = await asyncpg.connect(self.admin_url)
        try:
            return {name: [dict(row) for row in await connection.fetch(q)] for name, q in RESULT_QUERIES.items()}
        finally:
            await connection.close()


async def live_jobs(connection: asyncpg.Connection) -> int:
    """How many jobs have not ended."""
    count: int = await connection.fetchval(
        "select count(*) from upload_pipeline.upload_jobs where state in ('queued', 'working', 'retryable')"
    )
    return count


def write_documents(folder: Path, count: int, *, first_seed: int = 1) -> list[Path]:
    """Writes generated documents of all kinds, a different one for each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(first_seed, first_seed + count):
        kind = KINDS[seed % len(KINDS)]
        path = folder / f"document-{seed}.{kind}"
        path.write_bytes(make_document(kind, seed))  # type: ignore[arg-type]
        paths.append(path)
    return paths


def spread_over_users(paths: list[Path], users: int) -> list[tuple[Path, UUID]]:
    """Each file with one of so many users, in turn."""
    return [(path, UUID(int=(4 << 76) | (2 << 62) | (1 + i % users))) for i, path in enumerate(paths)]
