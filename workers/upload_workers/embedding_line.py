"""The texts that wait for a request, those that are under way, and the jobs that wait for them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING
from uuid import UUID

from upload_pipeline.errors import PipelineError
from upload_pipeline.providers.request_packing import bound_tokens
from upload_workers.steps import Snooze

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.database.queue import ClaimedJob
    from upload_workers.steps import Lacking

_LATELY = 30.0  # seconds that a look into the cache may take


class PutOff(Exception):  # noqa: N818 - nothing is wrong
    """The provider takes nothing for a while, or not from here: come back after `seconds`.

    Attributes:
        lacking: where another worker may serve the job at once, and this one not; see `Snooze`.
    """

    def __init__(self, seconds: float, lacking: Lacking | None = None) -> None:
        super().__init__(seconds)
        self.seconds = seconds
        self.lacking = lacking

    def outcome(self) -> Snooze:
        """What a step answers."""
        return Snooze(timedelta(seconds=self.seconds), self.lacking)


@dataclass(eq=False)
class Ticket:
    """One call of `embed`, and what has come for it: (positions, vectors).

    Attributes:
        chunk_ids: of the job's document, one for each text, that get their vectors as soon as they are there.
        late: its time is up, and what is not under way any more is put off.
    """

    job: ClaimedJob
    left: int
    chunk_ids: Sequence[UUID] | None = None
    late: bool = False
    arrived: asyncio.Queue[tuple[list[int], NDArray[np.float32]] | None] = field(default_factory=asyncio.Queue)
    error: Exception | None = None

    def give(self, positions: list[int], vectors: NDArray[np.float32]) -> None:
        """Some of its vectors are there."""
        self.left -= len(positions)
        self.arrived.put_nowait((positions, vectors))

    def fail(self, positions: int, error: Exception) -> None:
        """Some texts bring nothing. Of several reasons, one that tells more than "not now" stands."""
        self.left -= positions
        if self.error is None or _weight(error) > _weight(self.error):
            self.error = error
        self.arrived.put_nowait(None)


@dataclass(eq=False)
class Item:
    """A text in line or under way, and who waits for it: (ticket, position).

    Attributes:
        asked_by: the job that brought it; it pays where nobody waits any more.
    """

    key: tuple[UUID, UUID | None, str]
    tokens: int
    waiting: list[tuple[Ticket, int]]
    asked_by: UUID
    tries: int = 0

    @property
    def text(self) -> str:
        """What is sent."""
        return self.key[2]

    @property
    def user_id(self) -> UUID:
        """For whom."""
        return self.key[0]

    @property
    def company(self) -> UUID | None:
        """Only texts with the same value share a request: None, or a job that goes by itself."""
        return self.key[1]


class Line:
    """First come, first sent. A text of a user is in it once, and not at all twice while it is under way."""

    def __init__(self) -> None:
        self._waiting: deque[Item] = deque()
        self._items: dict[tuple[UUID, UUID | None, str], Item] = {}
        self._under_way: dict[tuple[UUID, str], Item] = {}  # whatever the company that they were sent in
        self._lately: dict[tuple[UUID, bytes], float] = {}  # what was done of late, and when, in order

    def __len__(self) -> int:
        return len(self._waiting)

    def join(
        self,
        job: ClaimedJob,
        texts: Sequence[str],
        chunk_ids: Sequence[UUID] | None = None,
        *,
        looked_at: float | None = None,
    ) -> Ticket:
        """A job's texts stand in line, or wait with others for one that does. One that failed before goes by itself.

        Args:
            job: whose texts they are.
            texts: of its document.
            chunk_ids: see `Ticket`.
            looked_at: when by the monotonic clock the job began to look for them in the cache: what was done since is
                there now, is not sent again, and is left to its next look.
        """
        ticket = Ticket(job, len(texts), chunk_ids)
        company = _company(job)
        for position, text in enumerate(texts):
            key = (job.user_id, company, text)
            item = self._items.get(key) or self._under_way.get((job.user_id, text))
            if item is None and looked_at is not None and self._lately.get(_mark(key), looked_at) > looked_at:
                ticket.left -= 1
                continue
            if item is None:
                self._stand(ticket, position, key)
            else:
                item.waiting.append((ticket, position))
        return ticket

    def take(self, most: int, limit: int) -> list[Item]:
        """The next request's texts: from the front, those that may share it with the first, at most so many tokens.

        A text that has gone out in other company is not sent a second time, unless it has failed in one of the two: who
        waits for it here waits for that one.
        """
        part: list[Item] = []
        kept: list[Item] = []
        tokens = 0
        while self._waiting and len(part) < most:
            item = self._waiting.popleft()
            sent = self._under_way.get((item.user_id, item.text))
            if not item.waiting:
                self._items.pop(item.key, None)
            elif sent is not None and not sent.tries and not item.tries:
                self._items.pop(item.key, None)
                sent.waiting += item.waiting
            elif part and item.company != part[0].company:
                kept.append(item)
            elif part and tokens + item.tokens > limit:
                kept.append(item)
                break
            else:
                part.append(item)
                tokens += item.tokens
                self._under_way[item.user_id, item.text] = item
        self._waiting.extendleft(reversed(kept))
        return part

    def take_all(self) -> list[Item]:
        """Everything that is in line."""
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def put_back(self, part: list[Item]) -> None:
        """To the front, in order. A job that goes by itself and waited for a request of others stands in line now.

        Its text has been tried as often as theirs.
        """
        for item in part:
            self._landed(item)
        self._waiting.extendleft(reversed(part))
        for item in part:
            for ticket, position in [*item.waiting]:
                company = _company(ticket.job)
                if company not in (None, item.company):
                    item.waiting.remove((ticket, position))
                    self._stand(ticket, position, (item.user_id, company, item.text), tries=item.tries)

    def forget(self, item: Item) -> None:
        """It is done: the same text stands in line anew."""
        self._items.pop(item.key, None)
        self._landed(item)
        now, mark = time.monotonic(), _mark(item.key)
        self._lately.pop(mark, None)
        self._lately[mark] = now
        while self._lately[first := next(iter(self._lately))] < now - _LATELY:
            del self._lately[first]

    def put_off_late(self, part: list[Item]) -> None:
        """Puts off those who wait for these texts and whose time is up."""
        for ticket in {ticket for item in part for ticket, _ in item.waiting if ticket.late}:
            self._put_off(ticket, part)

    def put_off(self, ticket: Ticket) -> None:
        """Its time is up: those of its texts that are not under way are put off."""
        ticket.late = True
        self._put_off(ticket, self._waiting)

    def _put_off(self, ticket: Ticket, items: Iterable[Item]) -> None:
        for item in items:
            mine = sum(waiter is ticket for waiter, _ in item.waiting)
            if mine:
                item.waiting = [(waiter, position) for waiter, position in item.waiting if waiter is not ticket]
                ticket.fail(mine, PutOff(0.0))

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for it any more; what is under way goes on."""
        if not ticket.left:
            return
        for item in self._items.values():
            item.waiting = [(waiter, position) for waiter, position in item.waiting if waiter is not ticket]
        for item in [item for item in self._waiting if not item.waiting]:
            self._waiting.remove(item)
            self._items.pop(item.key, None)

    def fail(self, part: list[Item], error: Exception) -> None:
        """They bring nothing."""
        for item in part:
            self._items.pop(item.key, None)
            self._landed(item)
            for ticket, _ in item.waiting:
                ticket.fail(1, error)

    def _stand(self, ticket: Ticket, position: int, key: tuple[UUID, UUID | None, str], *, tries: int = 0) -> None:
        item = self._items.get(key)
        if item is None:
            item = self._items[key] = Item(key, bound_tokens(key[2]), [], ticket.job.job_id, tries)
            self._waiting.append(item)
        item.waiting.append((ticket, position))

    def _landed(self, item: Item) -> None:
        if self._under_way.get((item.user_id, item.text)) is item:
            del self._under_way[item.user_id, item.text]


def _company(job: ClaimedJob) -> UUID | None:
    return job.job_id if job.retry_count else None


def _mark(key: tuple[UUID, UUID | None, str]) -> tuple[UUID, bytes]:
    return key[0], sha256(key[2].encode("utf-8", "replace")).digest()


def _weight(error: Exception) -> int:
    """A text that is refused will be again; "not now" says nothing of the job."""
    if isinstance(error, PutOff):
        return 0
    return 2 if isinstance(error, PipelineError) and not error.retryable else 1
