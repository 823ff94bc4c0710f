"""`scripts/bench ingest [FOLDER]`: pages, megabytes and chunks a second, over all and by stage, on real files.

The same files are then taken through parser, chunker and embedder one after the other with no queue, store or database
around them: the ratio says what being safe costs. FOLDER defaults to `../shared/corpus` where that is, else `samples`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import asyncpg
import uvloop

from benchmarks.contenders import until_drained
from benchmarks.contenders.ours import UNFINISHED
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.embedded import ensure_embedded, stop_embedded
from upload_pipeline.database.migrations import apply_migrations
from upload_pipeline.database.pools import open_pool
from upload_pipeline.errors import PipelineError
from upload_pipeline.intake.accept import accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.logs import configure_logs
from upload_pipeline.media_types import HEAD_BYTES, detect_media_type
from upload_pipeline.providers.embedding import open_embedder
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.settings import Settings, load_settings
from upload_pipeline.storage.store import open_store
from upload_pipeline.text.chunker import chunk_markdown
from upload_pipeline.text.normalise import normalise_markdown
from upload_workers.process import running_worker

ROOT = Path(__file__).resolve().parent.parent
STAGE_SECONDS = """
with step as (
  select job_id, stage, at - lag(at) over (partition by job_id order by event_id) as spent,
         lag(stage) over (partition by job_id order by event_id) as from_stage
    from upload_pipeline.events
   where code in ('job_claimed', 'job_advanced', 'job_done')
)
select from_stage as stage, extract(epoch from sum(spent))::float8 as seconds
  from step join upload_pipeline.stages s on s.pipeline = 'document' and s.stage = step.from_stage
 where step.stage <> from_stage
 group by from_stage, s.position order by s.position
"""


@dataclass(frozen=True)
class Work:
    """How much was done: files, their bytes, pages (1 for a file without), chunks."""

    files: int
    megabytes: float
    pages: int
    chunks: int

    def per_second(self, seconds: float) -> dict[str, float]:
        """Rates, by name."""
        return {
            "pages_per_s": round(self.pages / seconds, 1),
            "mb_per_s": round(self.megabytes / seconds, 2),
            "chunks_per_s": round(self.chunks / seconds, 1),
        }


def main(arguments: list[str]) -> None:
    """Runs the benchmark; with `--json` the last line is one object."""
    parser = argparse.ArgumentParser(prog="scripts/bench ingest", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--users", type=int, default=8, help="users that the files are spread over")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    corpus = ROOT.parent / "shared" / "corpus"
    folder = options.folder or (corpus if corpus.is_dir() else ROOT / "samples")
    with tempfile.TemporaryDirectory(prefix="bench-") as home_name:
        home = Path(home_name)
        database = ensure_embedded(home)
        try:
            apply_migrations(database.admin_url)
            settings = load_settings(home=home, database_url=database.worker_url, log_level="error")
            configure_logs(settings)
            work, seconds, stages, bare = uvloop.run(
                _measure(settings, database.admin_url, folder, options.users, options.concurrency)
            )
        finally:
            stop_embedded(home)
    print(f"{work.files} files, {work.megabytes:.1f} MB, {work.pages} pages, {work.chunks} chunks from {folder}\n")
    print(f"{'':22}{'seconds':>9}{'pages/s':>10}{'MB/s':>9}{'chunks/s':>10}")
    for name, spent in {"pipeline": seconds, **stages, "bare, one by one": bare}.items():
        rates = work.per_second(max(spent, 1e-9))
        print(
            f"{name:22}{spent:9.2f}{rates['pages_per_s']:10,.1f}{rates['mb_per_s']:9.2f}{rates['chunks_per_s']:10,.1f}"
        )
    print("\nA stage's seconds are those that jobs spent in it, several at a time.")
    if options.json:
        by_stage = {stage: work.per_second(max(spent, 1e-9)) for stage, spent in stages.items()}
        ratios = {"bare": round(bare / seconds, 3)}
        headline = {**work.per_second(seconds), "files": work.files, "seconds": round(seconds, 2)}
        print(json.dumps({"bench": "ingest", "ratios": ratios, **headline, "stages": by_stage}))


async def _measure(
    settings: Settings, admin_url: str, folder: Path, users: int, concurrency: int
) -> tuple[Work, float, dict[str, float], float]:
    pool = await open_pool(settings.database_url.get_secret_value(), connection_options(settings))
    parser = LocalParser(settings.parse_timeout, settings.parse_memory_bytes)
    scratch = settings.home / "scratch"
    intake = Intake(pool, open_store(settings.effective_storage_url), parser.inspect, settings.max_file_bytes, scratch)
    taken: list[Path] = []
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        user = UUID(int=(4 << 76) | (2 << 62) | (1 + number % users))
        try:
            accepted = await accept_path(intake, path=path, user_id=user, metadata={}, correlation_id="bench")
        except PipelineError as error:
            print(f"left out: {path.name}: {error.code}")
        else:
            if not accepted.duplicate:
                taken.append(path)
    admin = await asyncpg.connect(admin_url)
    async with running_worker(settings, settings.database_url.get_secret_value(), concurrency=concurrency):
        began = time.perf_counter()
        await until_drained(admin, UNFINISHED)
        seconds = time.perf_counter() - began
    row = await admin.fetchrow(
        "select count(*) as files, sum(file_bytes) / 1e6 as megabytes, sum(coalesce(page_count, 1)) as pages,"
        " sum(chunk_count) as chunks from upload_pipeline.documents where searchable_at is not null"
    )
    work = Work(row["files"], float(row["megabytes"]), row["pages"], row["chunks"])
    stages = {stage["stage"]: stage["seconds"] for stage in await admin.fetch(STAGE_SECONDS)}
    await admin.close()
    await pool.close()
    bare = await _bare(parser, taken, settings)
    parser.close()
    return work, seconds, stages, bare


async def _bare(parser: LocalParser, paths: list[Path], settings: Settings) -> float:
    embedder = open_embedder(settings.embedder, settings)
    await embedder.embed(["loaded before the clock starts"])
    began = time.perf_counter()
    for path in paths:
        head = path.open("rb").read(HEAD_BYTES)
        try:
            media_type = detect_media_type(path.name, head, size=path.stat().st_size)
            parsed = await parser.parse(path, media_type)
        except PipelineError:
            continue
        normalised = normalise_markdown(parsed.markdown, paged=parsed.page_count is not None)
        chunks = chunk_markdown(normalised.text, page_starts=normalised.page_starts)
        for begin in range(0, len(chunks), 256):
            await embedder.embed([chunk.text for chunk in chunks[begin : begin + 256]])
    return time.perf_counter() - began


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
