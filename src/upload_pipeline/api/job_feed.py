"""What is new of the jobs that somebody watches: one look for the whole process, however many clients there are.

The feed asks the database some times a second for the events of all watched jobs at once, and asks nothing while nobody
watches. It does not LISTEN, and that is measured: with sixteen writers a NOTIFY for each statement that writes events
leaves less than half of the commits (NOTIFY serialises them), and still less than they were where it is sent only while
somebody listens and never by two at once. A look costs the writers nothing, passes any pooler, and needs no second
way for the case that a notification is lost.

Of each watched job the feed keeps the last events, ready to be sent, once for all that watch it. A client that is slow
is a number: the id of the last event it was sent. One that falls behind what is kept reads the database.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
from fastapi.encoders import jsonable_encoder

from upload_pipeline.database.failures import DATABASE_FAILURES
from upload_pipeline.database.user_jobs import JobEvent, JobNews, job_news

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor

log = structlog.get_logger(__name__)

KEPT_EVENTS = 256
"""Events that are kept of a watched job; a job's whole way has some twenty."""

EVENTS_OF_A_LOOK = 200
"""Events that one look takes of one job; the next look takes the next ones."""

_LONGEST_WAIT = 5.0


@dataclass
class _Tail:
    """The end of a job's history.

    Attributes:
        start: `frames` has every event behind this id, up to `last`.
        finished: whether the job had ended when the last look found nothing more.
        joined: how often somebody began to watch.
        changed: set when there is more; replaced by a new one then.
    """

    start: int
    last: int
    frames: deque[tuple[int, bytes]] = field(default_factory=deque)
    finished: bool = False
    state: str | None = None
    watchers: int = 0
    joined: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, news: JobNews, joined: int) -> None:
        for event in news.events:
            self.frames.append((event.event_id, event_frame(event)))
            self.last = event.event_id
        while len(self.frames) > KEPT_EVENTS:
            self.start, _ = self.frames.popleft()
        # Who came while the look was under way waits for the next one: the job may have been started again between.
        self.finished, self.state = news.finished and joined == self.joined, news.state
        self.tell()

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Watch:
    """One client's view of a watched job."""

    def __init__(self, feed: JobFeed, tail: _Tail) -> None:
        self._feed = feed
        self._tail = tail

    def frames_after(self, event_id: int) -> list[tuple[int, bytes]] | None:
        """What there is behind an event, as (id, frame); None where that is further back than what is kept."""
        if event_id < self._tail.start:
            return None
        return [frame for frame in self._tail.frames if frame[0] > event_id]

    @property
    def start(self) -> int:
        """What is kept begins behind this id."""
        return self._tail.start

    @property
    def finished(self) -> bool:
        """Whether the job has ended and all its events are among the frames."""
        return self._tail.finished

    @property
    def state(self) -> str | None:
        """The job's state where it has ended; None where it is gone."""
        return self._tail.state

    @property
    def closed(self) -> bool:
        """Whether this process is about to stop."""
        return self._feed.closed

    async def wait(self, seconds: float) -> bool:
        """Waits until something changes, at most so long; whether it did."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._tail.changed.wait()
        return False


class JobFeed:
    """The watched jobs of this process, and the one task that looks for news of them.

    Args:
        db: of role `upload_worker`.
        interval: seconds between two looks.
    """

    def __init__(self, db: Executor, *, interval: float) -> None:
        self._db = db
        self._interval = interval
        self._tails: dict[UUID, _Tail] = {}
        self._watched = asyncio.Event()
        self.closed = False

    @property
    def watchers(self) -> int:
        """How many clients watch."""
        return sum(tail.watchers for tail in self._tails.values())

    @contextmanager
    def watch(self, job_id: UUID, *, after: int) -> Iterator[Watch]:
        """Watches a job for as long as the context is open. Whether the client may is asked before.

        Args:
            job_id: of the job.
            after: id of an event that the job has; 0 begins at the first one.
        """
        tail = self._tails.setdefault(job_id, _Tail(after, after))
        tail.watchers += 1
        tail.joined += 1
        tail.finished = False
        self._watched.set()
        try:
            yield Watch(self, tail)
        finally:
            tail.watchers -= 1
            if tail.watchers == 0 and self._tails.get(job_id) is tail:
                del self._tails[job_id]

    async def run(self) -> None:
        """Looks until cancelled. Where the database does not answer it is asked again, less and less often."""
        wait = self._interval
        while True:
            await self._watched.wait()
            await asyncio.sleep(wait)
            if not self._tails:
                self._watched.clear()
                continue
            try:
                await self._look()
                wait = self._interval
            except DATABASE_FAILURES as error:
                wait = min(wait * 2, max(_LONGEST_WAIT, self._interval))
                log.warning("job_feed_failed", error=str(error) or type(error).__name__, retry_in=wait)

    def close(self) -> None:
        """Ends every watch: clients come back elsewhere, with the id of the last event they had."""
        self.closed = True
        for tail in self._tails.values():
            tail.tell()

    async def _look(self) -> None:
        asked = {job_id: (tail, tail.joined) for job_id, tail in self._tails.items()}
        known = {job_id: tail.last for job_id, (tail, _) in asked.items()}
        for news in await job_news(self._db, known, limit=EVENTS_OF_A_LOOK):
            tail, joined = asked[news.job_id]
            tail.take(news, joined)


@asynccontextmanager
async def running_feed(db: Executor, *, interval: float) -> AsyncGenerator[JobFeed]:
    """A feed with its task, for as long as the context is open."""
    feed = JobFeed(db, interval=interval)
    task = asyncio.create_task(feed.run(), name="job feed")
    try:
        yield feed
    finally:
        feed.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def event_object(event: JobEvent) -> dict[str, object]:
    """An event as JSON has it."""
    encoded: dict[str, object] = jsonable_encoder(event)
    return encoded


def event_frame(event: JobEvent) -> bytes:
    """An event as a frame of `text/event-stream` (WHATWG HTML, section 9.2)."""
    data = json.dumps(event_object(event), ensure_ascii=False, separators=(",", ":"))
    return f"id: {event.event_id}\ndata: {data}\n\n".encode("utf-8", "replace")
