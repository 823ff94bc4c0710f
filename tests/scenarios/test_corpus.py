"""The real files of the corpus, each ending as its manifest says, by one command and by four workers."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.scenarios.world import World

PHOTOS = {".jpg", ".png"}
"""Photos become a pipeline of their own; to this one they are files of a kind that it does not take."""

REFUSED = {
    "encrypted.pdf": {"ENCRYPTED"},
    "empty.pdf": {"EMPTY_FILE"},
    "empty.txt": {"EMPTY_FILE"},
    "text-named.pdf": {"TYPE_MISMATCH"},
    "binary.txt": {"TYPE_MISMATCH"},
}
PHOTO_CODES = {"UNSUPPORTED_TYPE", "TYPE_MISMATCH"}


def manifest(corpus: Path) -> dict[str, dict[str, str]]:
    """The manifest's rows by file name."""
    with (corpus / "MANIFEST.csv").open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def ingest(world: World, *arguments: str | Path) -> dict[str, dict[str, Any]]:
    """Runs the command; its lines by file name."""
    environment = {
        **os.environ,
        "UPLOAD_PIPELINE_HOME": str(world.home),
        "UPLOAD_PIPELINE_DATABASE_URL": world.worker_url,
        "UPLOAD_PIPELINE_LOG_LEVEL": "error",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from upload_pipeline.cli.app import main; main()", "ingest", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1, f"some of the corpus is refused, so the status is 1: {done.stderr}"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(line["path"]).name: line for line in lines}


def corpus_files(corpus: Path, rows: dict[str, dict[str, str]]) -> list[Path]:
    return [corpus / name for name in rows]


def check_ends(rows: dict[str, dict[str, str]], lines: dict[str, dict[str, Any]]) -> None:
    """Holds each line against its row."""
    assert set(lines) == set(rows)
    for name, row in rows.items():
        line = lines[name]
        code = (line["error"] or {}).get("code")
        if Path(name).suffix in PHOTOS:
            assert (line["state"], code in PHOTO_CODES) == ("refused", True), line
        elif row["expected"] == "accept":
            assert (line["state"], line["stage"], line["error"]) == ("done", "embedded", None), line
            assert line["chunks"] > 0
        elif row["expected"].startswith("reject"):
            assert (line["state"], code in REFUSED[name]) == ("refused", True), line
        else:
            assert row["expected"] == "accept-or-reject"
            assert line["state"] in {"done", "refused", "deadletter"}, line
            assert (line["state"] == "done") == (line["error"] is None), line


async def check_pages(admin_url: str, rows: dict[str, dict[str, str]]) -> None:
    """Page counts are the manifest's; chunks go through the pages in order and touch the last page with text."""
    connection = await asyncpg.connect(admin_url)
    documents = await connection.fetch(
        """
        select d.filename, d.page_count, d.page_starts, d.markdown_chars,
               array_agg(c.page_from order by c.ordinal) as froms, array_agg(c.page_to order by c.ordinal) as tos,
               array_agg(c.start_offset order by c.ordinal) as starts,
               array_agg(c.end_offset order by c.ordinal) as ends
          from upload_pipeline.documents d join upload_pipeline.document_chunks c using (document_id)
         where c.live group by d.document_id
        """
    )
    await connection.close()
    seen = 0
    for document in documents:
        assert document["starts"] == [0, *document["ends"][:-1]], "spans tile the text"
        assert document["ends"][-1] == document["markdown_chars"]
        if document["page_count"] is None:
            assert set(document["froms"]) == {None}
            continue
        seen += 1
        pages = rows[document["filename"]]["pages"]
        assert str(document["page_count"]) == pages, document["filename"]
        assert len(document["page_starts"]) == document["page_count"]
        places = list(zip(document["froms"], document["tos"], strict=True))
        assert all(1 <= first <= last <= document["page_count"] for first, last in places), document["filename"]
        assert document["froms"] == sorted(document["froms"])
    assert seen >= 15, "the corpus has PDFs"


@pytest.fixture
def rows(corpus: Path) -> dict[str, dict[str, str]]:
    return manifest(corpus)


async def test_each_file_ends_as_its_row_says_and_a_second_run_does_nothing(
    world: World, corpus: Path, rows: dict[str, dict[str, str]]
) -> None:
    files = corpus_files(corpus, rows)
    lines = await asyncio.to_thread(ingest, world, *files, "--json")

    check_ends(rows, lines)
    await check_pages(world.admin_url, rows)
    same = {name: lines[name]["document_id"] for name in ("hebrew-יהודיה.pdf", "same-bytes-ユダヤ.pdf")}
    assert len(set(same.values())) == 1, "same user, same bytes: one document"
    assert sorted(lines[name]["duplicate"] for name in same) == [False, True]

    before = await world.results()
    events = await event_count(world)
    again = await asyncio.to_thread(ingest, world, *files, "--json")
    for name, line in again.items():
        assert line["state"] == lines[name]["state"]
        assert line["document_id"] == lines[name]["document_id"]
        assert line["duplicate"] == (line["state"] != "refused")
    assert await world.results() == before
    assert await event_count(world) == events, "nothing was stored and nothing was processed"


async def test_four_workers_bring_the_same_ends(world: World, corpus: Path, rows: dict[str, dict[str, str]]) -> None:
    files = corpus_files(corpus, rows)
    await asyncio.to_thread(ingest, world, *files, "--json", "--no-wait")
    for _ in range(4):
        world.start_worker()
    await world.until_ended(200)
    check_ends(rows, await asyncio.to_thread(ingest, world, *files, "--json"))
    await check_pages(world.admin_url, rows)


async def event_count(world: World) -> int:
    """How many events there are of documents and jobs; a worker's own start and stop do not count."""
    connection = await asyncpg.connect(world.admin_url)
    count: int = await connection.fetchval(
        "select count(*) from upload_pipeline.events where code not in ('worker_started', 'worker_stopped')"
    )
    await connection.close()
    return count
