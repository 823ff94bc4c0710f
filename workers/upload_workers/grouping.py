"""Grouping: transitions that jobs ask for within a few milliseconds travel as one statement.

Two commits a job cap any queue at some thousand jobs a second; a hundred jobs in one statement share one commit. A
job waits at most `window` seconds plus the statement that is under way, and a stale token in a group is missing from
the answer while the others move, so one lost job never costs its neighbours anything.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from upload_pipeline.database import queue
from upload_pipeline.database.queue import Advance, Transition
from upload_workers.passing import is_passing

if TYPE_CHECKING:
    from datetime import timedelta

    from upload_pipeline.database.queue import Executor

_Member: TypeAlias = tuple[Advance, asyncio.Future[Transition | None]]

GROUP_LIMIT = 500
"""Most transitions in one statement; past some hundreds the commit is shared out and arrays only grow."""

SENDERS = 2
"""Statements under way at once: the database works on one while this process takes in the answer of the other."""

GROUP_FULL = 100
"""Transitions that must wait before a second statement is sent beside the first; fewer are cheaper in the next one."""


@dataclass
class GroupedAdvances:
    """Collects transitions and sends them together.

    Attributes:
        window: seconds that the first of a group waits for others.
    """

    db: Executor
    ttl: timedelta
    window: float
    _waiting: list[_Member] = field(default_factory=list)
    _senders: set[asyncio.Task[None]] = field(default_factory=set)

    async def advance(self, asked: Advance) -> Transition | None:
        """Moves one job on; None where its lease is lost.

        Raises:
            Exception: whatever the statement raised; the transition may or may not have happened, and asking the
                same again is safe.
        """
        future: asyncio.Future[Transition | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if len(self._senders) < SENDERS and (not self._senders or len(self._waiting) >= GROUP_FULL):
            self._senders.add(asyncio.create_task(self._send_all(), name="grouped-advances"))
        return await future

    async def _send_all(self) -> None:
        group: list[_Member] = []
        try:
            # Only a sender's first group waits: while its statement is under way, the next one gathers by itself.
            await asyncio.sleep(self.window)
            while self._waiting:
                group, self._waiting = self._waiting[:GROUP_LIMIT], self._waiting[GROUP_LIMIT:]
                await self._send(group)
        except asyncio.CancelledError:
            left, self._waiting = self._waiting, []
            _fail([*group, *left], ConnectionAbortedError("the worker stopped while a transition was under way"))
            raise
        finally:
            # In the same turn in which it saw that nobody waits: whoever comes after that finds it gone.
            self._senders.discard(asyncio.current_task())

    async def _send(self, group: list[_Member]) -> None:
        # Nobody waits any more for the transition of a job that was stopped: it is failed or handed back instead.
        group = [member for member in group if not member[1].done()]
        if not group:
            return
        try:
            moved = await queue.advance_jobs(self.db, [asked for asked, _ in group], ttl=self.ttl)
        except Exception as error:  # noqa: BLE001 - handed to every waiter, who must not wait for ever
            if len(group) == 1 or is_passing(error):
                _fail(group, error)
                return
            # One of them asks for what cannot be: a stage that does not follow, or results that are no JSON. That is
            # a bug of its step, and not of its neighbours.
            for member in group:
                await self._send([member])
        else:
            for asked, future in group:
                if not future.done():
                    future.set_result(moved.get(asked.lease.job_id))


def _fail(group: list[_Member], error: BaseException) -> None:
    for _, future in group:
        if not future.done():
            future.set_exception(error)
