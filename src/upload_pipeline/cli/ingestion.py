"""What `ingest` does: files go in a few at a time, their jobs are watched by one query, and a worker runs beside it.

    waiting ──▶ intake ──▶ job (queued, working, retryable) ──▶ done | deadletter | cancelled
                   └─────▶ refused

The worker runs in this process, from the moment that there is a job and none of the workers that the register has
heard of serves it. Stopped, intake lets go of what it has not finished, and the worker hands its jobs back.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID, uuid4

from upload_pipeline.cli.batch_intake import take_batch
from upload_pipeline.cli.failures import INTERRUPTED, expected
from upload_pipeline.cli.opening import open_database
from upload_pipeline.cli.worker_beside import WorkerBeside
from upload_pipeline.database.batches import note_batch
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.listings import JobProgress, job_progress
from upload_pipeline.database.pools import open_pool
from upload_pipeline.errors import ErrorCode
from upload_pipeline.intake.accept import accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.storage.configured import configured_store
from upload_pipeline.storage.virus_scan import open_scanner

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor
    from upload_pipeline.settings import Settings

INTAKES = 4
"""Files on their way in at once: enough to keep the disk and a core busy."""
LOOK_SECONDS = 0.2
"""Between two looks at the jobs."""
OUTAGE_SECONDS = 60.0
"""How long the database may be away while jobs are watched; their work goes on when it is back."""
ENDED = frozenset({"done", "deadletter", "cancelled", "refused"})


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be taken in, for whom, and whether to stay until it is done; with a mapping, as one batch."""

    files: Sequence[Path]
    user_id: UUID
    metadata: Mapping[str, Any]
    wait: bool
    mapping: Path | None = None


@dataclass(slots=True)
class FileRun:
    """A file on its way.

    Attributes:
        state: None before intake has begun, `intake`, then the job's; `refused` where intake turned the file away.
        progress: percent.
        begun: when intake took it up, on the monotonic clock.
        ended: whether it stays as it is.
    """

    path: Path
    state: str | None = None
    stage: str | None = None
    progress: int = 0
    document_id: UUID | None = None
    job_id: UUID | None = None
    batch_id: UUID | None = None
    duplicate: bool = False
    chunks: int | None = None
    retry_count: int = 0
    code: str | None = None
    message: str | None = None
    begun: float = 0.0
    seconds: float = 0.0
    ended: bool = False

    def as_json(self) -> dict[str, Any]:
        """The line of `--json`."""
        return {
            **({} if self.batch_id is None else {"batch_id": self.batch_id}),
            "path": str(self.path),
            "document_id": self.document_id,
            "job_id": self.job_id,
            "state": self.state,
            "stage": self.stage,
            "chunks": self.chunks,
            "duplicate": self.duplicate,
            "seconds": round(self.seconds, 3),
            "error": None if self.code is None else {"code": self.code, "message": self.message},
        }


class Display(Protocol):
    """Shows how files fare."""

    def show(self, files: Sequence[FileRun]) -> None:
        """All files as they stand now; called a few times a second."""

    def ended(self, file: FileRun) -> None:
        """One file has come to its end."""

    def stopping(self) -> None:
        """The user asked to stop."""


@dataclass
class Ingestion:
    """The files of one call and what became of them."""

    files: list[FileRun]
    begun: float
    seconds: float = 0.0
    interrupted: bool = False
    batch_id: UUID | None = None
    by_job: dict[UUID, list[FileRun]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All files."""
        return len(self.files)

    @property
    def done(self) -> int:
        """Files that are searchable."""
        return sum(file.state == "done" for file in self.files)

    @property
    def queued(self) -> int:
        """Files that were taken in and whose jobs have not ended."""
        return sum(file.job_id is not None and file.state not in ENDED for file in self.files)

    @property
    def failed(self) -> int:
        """Files that were refused, or whose jobs ended otherwise than done."""
        return sum(file.state in ENDED and file.state != "done" for file in self.files)

    @property
    def open_count(self) -> int:
        """Files that have not come to an end."""
        return sum(not file.ended for file in self.files)

    @property
    def duplicates(self) -> int:
        """Files that were known before."""
        return sum(file.duplicate for file in self.files)

    @property
    def chunks(self) -> int:
        """Chunks of the documents that are done, each counted once."""
        return sum({file.document_id: file.chunks or 0 for file in self.files if file.state == "done"}.values())


async def ingest(settings: Settings, request: Request, display: Display) -> Ingestion:
    """Takes files in and, with `wait`, stays until all their jobs have ended. Failures of files are results.

    The first TERM or INT stops it cleanly, the second at once.

    Raises:
        PipelineError: what keeps all files from being processed: database, store, settings.
    """
    run = Ingestion([FileRun(path) for path in request.files], time.monotonic())
    async with AsyncExitStack() as opened:
        stop = opened.enter_context(_stop_requested(settings.shutdown_deadline, display))
        urls = await asyncio.to_thread(open_database, settings)
        store = configured_store(settings)
        db = await open_pool(urls.worker, connection_options(settings, "upload-pipeline ingest"), size=INTAKES + 2)
        opened.push_async_callback(db.close)
        parser = LocalParser(settings.parse_timeout, settings.parse_memory_bytes)
        opened.callback(parser.close)
        worker = WorkerBeside(settings, urls.worker, store, db) if request.wait else None
        if worker is not None:
            opened.push_async_callback(worker.stop)
        intake = Intake(
            db,
            store,
            parser.inspect,
            settings.max_file_bytes,
            settings.home / "scratch",
            min_free_bytes=settings.min_free_bytes,
            scanner=open_scanner(settings.clamd_url, seconds=settings.clamd_timeout),
        )
        async with _intakes(intake, settings, request, run) as taking:
            await _follow(db, run, taking, worker, display, stop)
        if stop.is_set() and worker is not None:
            await worker.stop()
            # The steps that it let finish may have been the last ones of their jobs.
            await _look(db, run, worker, display)
        if run.batch_id is not None:
            await note_batch(db, run.batch_id)
    run.interrupted = stop.is_set() and run.open_count > 0
    run.seconds = time.monotonic() - run.begun
    return run


@contextmanager
def _stop_requested(deadline: float, display: Display) -> Iterator[asyncio.Event]:
    """An event that the first TERM or INT sets. The second, or `deadline` seconds, end the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    timer = threading.Timer(deadline, os._exit, (INTERRUPTED,))
    timer.daemon = True

    def signalled() -> None:
        if stop.is_set():
            os._exit(INTERRUPTED)
        stop.set()
        # From a thread: a socket that never answers, or a busy event loop, cannot hold it up.
        timer.start()
        display.stopping()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signalled)
    try:
        yield stop
    finally:
        timer.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@asynccontextmanager
async def _intakes(
    intake: Intake, settings: Settings, request: Request, run: Ingestion
) -> AsyncIterator[asyncio.Future[Any]]:
    """The intake of all files, a few at a time or together as a batch; cancelled when left."""
    waiting = iter(run.files)
    correlation_id = f"ingest-{uuid4()}"
    if request.mapping is not None:
        intakes = [take_batch(intake, settings, request, run, correlation_id)]
    else:
        intakes = [_take_in(intake, request, run, waiting, correlation_id) for _ in range(min(INTAKES, len(run.files)))]
    tasks = asyncio.gather(*intakes)
    try:
        yield tasks
    finally:
        tasks.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait((tasks,))


async def _take_in(
    intake: Intake, request: Request, run: Ingestion, waiting: Iterator[FileRun], correlation_id: str
) -> None:
    for file in waiting:
        file.begun = time.monotonic()
        file.state = "intake"
        try:
            accepted = await accept_path(
                intake,
                path=file.path,
                user_id=request.user_id,
                metadata=request.metadata,
                correlation_id=correlation_id,
            )
        except Exception as error:
            named = expected(error)
            if named is None:
                raise
            file.code, file.message, file.state = str(named.code), named.message, "refused"
            continue
        file.document_id, file.job_id, file.duplicate = accepted.document_id, accepted.job_id, accepted.duplicate
        if accepted.job_id is None:
            file.code, file.state = str(ErrorCode.JOB_NOT_FOUND), "refused"
            file.message = (
                f"The file is document {accepted.document_id}, whose jobs have been removed. Delete the document by "
                "`upload-pipeline delete` and ingest the file again."
            )
            continue
        file.state = "queued"
        run.by_job.setdefault(accepted.job_id, []).append(file)


async def _follow(
    db: Executor,
    run: Ingestion,
    taking: asyncio.Future[Any],
    worker: WorkerBeside | None,
    display: Display,
    stop: asyncio.Event,
) -> None:
    """Looks at the jobs until every file has come to its end, or stop is asked for."""
    answered = time.monotonic()
    while not stop.is_set():
        # Before the look: what intake ends with is then looked at.
        all_in = taking.done()
        try:
            await _look(db, run, worker, display)
            if worker is not None and run.queued:
                await worker.ensure()
            answered = time.monotonic()
        except Exception as error:
            named = expected(error)
            if named is None or named.code is not ErrorCode.DATABASE_UNAVAILABLE:
                raise
            if time.monotonic() - answered > OUTAGE_SECONDS:
                raise named from error
        if all_in:
            taking.result()
            if run.open_count == 0:
                return
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), LOOK_SECONDS)


async def _look(db: Executor, run: Ingestion, worker: WorkerBeside | None, display: Display) -> None:
    """One look at all jobs that have not ended; without a worker, one look is all that a file gets."""
    unended = [job for job, files in run.by_job.items() if not all(file.ended for file in files)]
    found = await job_progress(db, unended) if unended else {}
    for job in unended:
        for file in run.by_job[job]:
            _apply(file, found.get(job))
            if not file.ended and worker is None:
                _end(file, display)
    for file in run.files:
        if not file.ended and file.state in ENDED:
            _end(file, display)
    display.show(run.files)


def _apply(file: FileRun, found: JobProgress | None) -> None:
    if file.ended:
        return
    if found is None:
        file.state, file.code = "cancelled", str(ErrorCode.DOCUMENT_NOT_FOUND)
        file.message = "The document was deleted while it was processed. Ingest the file again if that was a mistake."
        return
    file.state, file.stage, file.progress = found.state, found.stage, found.progress
    file.retry_count = found.retry_count
    if found.state == "done":
        file.chunks = found.chunk_count
    elif found.state in ENDED:
        file.code = found.error_code or str(ErrorCode.INVALID_STATE)
        file.message = found.error_message or (
            f"The job is {found.state}. Start it again by `upload-pipeline retry {found.job_id}`."
        )


def _end(file: FileRun, display: Display) -> None:
    file.ended = True
    file.seconds = time.monotonic() - file.begun
    display.ended(file)
