"""What is new of the jobs that somebody watches: one look for the whole process, however many clients there are.

One task asks the database for the events of watched jobs, of all that are due at once, and asks nothing while nobody
watches. What is due: a job that a notification names; a job for which notifications cannot be relied on yet, at short
intervals (`WatchedJobs`); and now and then all of them. A notification only says when to look, so one that is lost
costs time and nothing else. There is one LISTEN connection for the process; behind a transaction pooler there is none,
and looking at short intervals is enough.

Of each watched job the feed keeps the last events, ready to be sent, once for all that watch it. A client that is slow
is a number: the id of the last event it was sent. One that falls behind what is kept reads the database.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline.api.job_bodies import Event
from upload_pipeline.api.watched_jobs import WatchedJobs
from upload_pipeline.database.failures import DATABASE_FAILURES
from upload_pipeline.database.job_watches import EVENT_CHANNEL, job_ids_of
from upload_pipeline.database.listening import Listener
from upload_pipeline.database.user_jobs import JobEvent, JobNews, job_news

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import asyncpg

    from upload_pipeline.database.queue import Executor

log = structlog.get_logger(__name__)

KEPT_EVENTS = 256
"""Events that are kept of a watched job; a job's whole way has some twenty."""

EVENTS_OF_A_LOOK = 200
"""Events that one look takes of one job; the next look takes the next ones."""

LONGEST_TOLD_INTERVAL = 15.0
"""Most seconds between two looks at all jobs; each renews the watches where that is due."""

_GAP = 0.02
"""Seconds between the beginnings of two looks: what is due within them is asked for at once."""

_LONGEST_OUTAGE_WAIT = 5.0
_FORGET_SECONDS = 1.0


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
        interval: seconds between two looks at a job for which notifications cannot be relied on.
        told_interval: seconds between two looks at all jobs.
    """

    def __init__(self, db: Executor, *, interval: float, told_interval: float) -> None:
        self._db = db
        self._interval = interval
        self._told_interval = min(told_interval, LONGEST_TOLD_INTERVAL)
        self._tails: dict[UUID, _Tail] = {}
        self._watches = WatchedJobs(db)
        self._due: set[UUID] = set()
        self._wake = asyncio.Event()
        self._looked = self._polled = self._looked_at_all = float("-inf")
        self.closed = False

    @property
    def watchers(self) -> int:
        """How many clients watch."""
        return sum(tail.watchers for tail in self._tails.values())

    @property
    def listening(self) -> bool:
        """Whether notifications arrive."""
        return self._watches.listening

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
        self._look_soon({job_id})
        try:
            yield Watch(self, tail)
        finally:
            tail.watchers -= 1
            if tail.watchers == 0 and self._tails.get(job_id) is tail:
                del self._tails[job_id]

    async def run(self) -> None:
        """Looks until cancelled. Where the database does not answer it is asked again, less and less often."""
        outage = 0.0
        while True:
            await asyncio.sleep(outage)
            await self._until_due()
            try:
                await self._round()
                outage = 0.0
            except DATABASE_FAILURES as error:
                outage = min(max(outage * 2, self._interval), max(_LONGEST_OUTAGE_WAIT, self._interval))
                log.warning("job_feed_failed", error=str(error) or type(error).__name__, retry_in=outage)

    def heard(self, payload: str) -> None:
        """A notification has come."""
        self._look_soon(job_ids_of(payload) & self._tails.keys())

    def proved(self) -> None:
        """From now on notifications arrive."""
        self._watches.proved()
        self._wake.set()

    def lost(self) -> None:
        """They do not any more."""
        self._watches.lost()
        self._wake.set()

    def close(self) -> None:
        """Ends every watch: clients come back elsewhere, with the id of the last event they had."""
        self.closed = True
        for tail in self._tails.values():
            tail.tell()

    async def forget(self) -> None:
        """Tells the database that nobody watches here any more; where it does not hear that, the watches run out."""
        with suppress(*DATABASE_FAILURES):
            async with asyncio.timeout(_FORGET_SECONDS):
                await self._watches.end()

    def _look_soon(self, job_ids: set[UUID]) -> None:
        if job_ids:
            self._due |= job_ids
            self._wake.set()

    async def _until_due(self) -> None:
        now = asyncio.get_running_loop().time
        while (wait := self._next_round() - now()) > 0:
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if wait == float("inf") else wait):
                    await self._wake.wait()

    def _next_round(self) -> float:
        if not self._tails:
            return self._looked if len(self._watches) else float("inf")
        if self._due:
            return self._looked + _GAP
        if all(self._watches.told(job_id) for job_id in self._tails):
            return self._looked_at_all + self._told_interval
        return self._polled + self._interval

    async def _round(self) -> None:
        self._looked = asyncio.get_running_loop().time()
        due, self._due = self._due, set()
        try:
            await self._watches.keep(set(self._tails))
            chosen = due & self._tails.keys()
            if self._looked >= self._polled + self._interval:
                chosen |= {job_id for job_id in self._tails if not self._watches.told(job_id)}
                self._polled = self._looked
            if self._looked >= self._looked_at_all + self._told_interval:
                chosen |= self._tails.keys()
                self._looked_at_all = self._looked
            if chosen:
                await self._look(chosen)
        except BaseException:
            self._due |= due
            raise

    async def _look(self, job_ids: set[UUID]) -> None:
        asked = {job_id: (tail, tail.joined) for job_id in job_ids if (tail := self._tails.get(job_id))}
        known = {job_id: tail.last for job_id, (tail, _) in asked.items()}
        found = await job_news(self._db, known, limit=EVENTS_OF_A_LOOK)
        for news in found.jobs:
            tail, joined = asked[news.job_id]
            tail.take(news, joined)
            if len(news.events) == EVENTS_OF_A_LOOK:
                self._due.add(news.job_id)
        self._watches.looked(asked, found.oldest_running)


@asynccontextmanager
async def running_feed(
    db: Executor,
    *,
    connect: Callable[[], Awaitable[asyncpg.Connection]] | None,
    interval: float,
    told_interval: float,
) -> AsyncGenerator[JobFeed]:
    """A feed with its tasks, for as long as the context is open.

    Args:
        db: of role `upload_worker`.
        connect: opens a session connection to listen on; None where there can be none.
        interval: as for `JobFeed`.
        told_interval: as for `JobFeed`.
    """
    feed = JobFeed(db, interval=interval, told_interval=told_interval)
    tasks = [asyncio.create_task(feed.run(), name="job feed")]
    if connect is not None:
        listener = Listener(connect, EVENT_CHANNEL, feed.heard, proved=feed.proved, lost=feed.lost)
        tasks.append(asyncio.create_task(listener.run(), name="job feed listener"))
    try:
        yield feed
    finally:
        feed.close()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await feed.forget()


def event_frame(event: JobEvent) -> bytes:
    """An event as a frame of `text/event-stream` (WHATWG HTML, section 9.2); its data as the list of events has it."""
    return f"id: {event.event_id}\ndata: {Event.model_validate(event).model_dump_json()}\n\n".encode()
