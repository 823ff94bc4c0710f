"""What quickstart searches for finds the file that it was given first, whatever else it was given."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.scenarios.world import World, spread_over_users, write_documents
from upload_pipeline.ids import LOCAL_USER_ID

ROOT = Path(__file__).parents[2]
SEARCH = "from upload_pipeline.cli.app import main; main()"


def first_hit(world: World, path: Path) -> tuple[str, str]:
    """The question that quickstart makes of a file, and the file that it finds."""
    environment = {
        **os.environ,
        "UPLOAD_PIPELINE_HOME": str(world.home),
        "UPLOAD_PIPELINE_DATABASE_URL": world.worker_url,
    }

    def output(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    question = output(str(ROOT / "scripts" / "opening-words"), str(path))
    hits = json.loads(output("-c", SEARCH, "search", question, "--json"))["hits"]
    return question, hits[0]["filename"]


async def check_each(world: World, files: list[Path]) -> None:
    await world.ingest([(path, LOCAL_USER_ID) for path in files])
    world.start_worker()
    assert await world.until_ended(60) == {"done": len(files)}
    for path in files:
        question, found = await asyncio.to_thread(first_hit, world, path)
        assert found == path.name, question


async def test_a_generated_file_is_found(world: World) -> None:
    await check_each(world, write_documents(world.home / "files", 5))


async def test_a_real_file_is_found(world: World, corpus: Path) -> None:
    names = ("federal-register.pdf", "contract-propane.pdf", "policy-cyber-risk.pdf", "report.docx")
    await check_each(world, [corpus / name for name in names])


async def test_what_is_not_there_is_no_question(world: World) -> None:
    await world.ingest(spread_over_users(write_documents(world.home / "files", 1), users=1))
    environment = {**os.environ, "UPLOAD_PIPELINE_DATABASE_URL": world.worker_url}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(ROOT / "scripts" / "opening-words"), "nothing.pdf"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (1, b"")
