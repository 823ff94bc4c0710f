"""What each worker was given for money, and what of it a kill may cost: books that name the worker."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import asyncpg
from aiohttp import web

from tests.simulators.openai_embeddings import OpenAISimulator


@dataclass(frozen=True)
class Payment:
    """A text that was paid for: when, by the monotonic clock, by which worker, and whether nobody got its vector."""

    at: float
    worker: int
    text: str
    lost: bool


class NamingOpenAI(OpenAISimulator):
    """Has an address for each worker, so that it knows who asks, and notes what each request paid for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.payments: list[Payment] = []
        self._more = asyncio.Event()

    def address_of(self, worker: int) -> str:
        """The base URL by which a worker is known."""
        return self.url.removesuffix("/v1") + f"/{worker}/v1"

    def app(self) -> web.Application:
        """One more route."""
        app = super().app()
        app.router.add_post("/{worker:[0-9]+}" + self.path, self._serve)
        return app

    def pay(self, request: web.Request, inputs: list[str], tokens: int, lost: list[str]) -> None:
        """Notes who paid."""
        super().pay(request, inputs, tokens, lost)
        now, worker = time.monotonic(), int(request.match_info["worker"])
        self.payments += [Payment(now, worker, text, text in lost) for text in inputs]
        self._more.set()

    async def until_answered(self, mark: str, *, least: int, most: int) -> int:
        """Waits until a worker has just been answered so many texts that hold a mark, and not more; the worker."""
        while True:
            self._more.clear()
            await self._more.wait()
            worker = self.payments[-1].worker
            if least <= sum(times for text, times in self.answered(worker).items() if mark in text) <= most:
                return worker

    def answered(self, worker: int) -> Counter[str]:
        """How often a worker was given the vector of each text."""
        return Counter(paid.text for paid in self.payments if paid.worker == worker and not paid.lost)

    def answered_others(self, worker: int, *, until: float) -> Counter[str]:
        """How often all others were, until a moment."""
        return Counter(
            paid.text for paid in self.payments if paid.worker != worker and paid.at <= until and not paid.lost
        )


@dataclass(frozen=True)
class Kill:
    """A worker that was killed.

    Attributes:
        worker: which.
        at: when it was dead and the cache was looked at, by the monotonic clock.
        kept: for how many users the cache had a text then, by its SHA-256.
    """

    worker: int
    at: float
    kept: Counter[bytes]

    def had(self, text: str) -> int:
        """For how many users a text was kept."""
        return self.kept[sha256(text.encode()).digest()]

    def unstored(self, simulator: NamingOpenAI) -> Counter[str]:
        """What the worker was answered that was not kept when it was dead: to be paid for once more, and no oftener."""
        mine, others = simulator.answered(self.worker), simulator.answered_others(self.worker, until=self.at)
        return mine & (mine + others - Counter({text: self.had(text) for text in mine}))


async def look_at_kill(connection: asyncpg.Connection, worker: int) -> Kill:
    """To be called as soon as the worker is dead, before anybody can have taken its jobs up."""
    rows = await connection.fetch(
        "select text_sha256, count(*) as users from upload_pipeline.embedding_cache group by 1"
    )
    return Kill(worker, time.monotonic(), Counter({row["text_sha256"]: row["users"] for row in rows}))


def paid_too_often(simulator: NamingOpenAI, needed: Counter[str], kills: Sequence[Kill]) -> dict[str, list[Payment]]:
    """The payments of each text that was paid for more often than users, lost answers and kills explain."""
    allowed = needed + simulator.books.lost
    for kill in kills:
        allowed += kill.unstored(simulator)
    return _of(simulator, (text for text, times in simulator.books.paid.items() if times > allowed[text]))


def paid_though_kept(simulator: NamingOpenAI, needed: Counter[str], kill: Kill) -> dict[str, list[Payment]]:
    """The payments of each text that was paid for after a kill, though the cache had it for all who need it."""
    later = {paid.text for paid in simulator.payments if paid.at > kill.at}
    return _of(simulator, (text for text in later if kill.had(text) >= needed[text]))


def _of(simulator: NamingOpenAI, texts: Iterable[str]) -> dict[str, list[Payment]]:
    return {text: [paid for paid in simulator.payments if paid.text == text] for text in texts}
