"""What the simulated LlamaCloud keeps: files, jobs, how they are to end, what goes wrong, and the books of it all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class Fault(StrEnum):
    """How an answer can go wrong."""

    RATE_LIMITED = "rate_limited"  # 429 and Retry-After
    RATE_LIMITED_SILENT = "rate_limited_silent"  # 429 without it
    QUOTA = "quota"  # 402
    UNAUTHORISED = "unauthorised"  # 401
    REJECTED = "rejected"  # 422
    SERVER_ERROR = "server_error"  # 500 and x-should-retry: true
    HANG = "hang"  # no answer, ever, and nothing done
    STALLED = "stalled"  # done, and no answer, ever
    DROPPED = "dropped"  # done, and the connection is closed without an answer
    TRUNCATED = "truncated"  # done, and half of the JSON
    GONE = "gone"  # 404: the retention is over


class Ending(StrEnum):
    """How a job that is made ends."""

    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass
class Books:
    """What was done and paid for.

    Attributes:
        paid: how often each document was paid for: by the `document` of its job's user_metadata, or its file's id.
        lost: of these, whose answer was dropped or cut off by the simulator.
        pages: paid for, in all.
        credits: paid, in all.
        uploads: how often each external file id was uploaded.
        requests: by operation: upload, find, submit, list, poll.
        over_limit: requests refused since a minute was full; a client with a true budget causes none.
        over_window: by operation, those refused since too many of its kind came in some seconds.
        faults: what was done wrong, and how often.
        webhooks: messages sent, and those among them that were answered by 2xx.
    """

    paid: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    pages: int = 0
    credits: int = 0
    uploads: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    over_limit: int = 0
    over_window: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    webhooks: Counter[str] = field(default_factory=Counter)

    def paid_again(self) -> dict[str, int]:
        """Documents that were paid for more often than once, and how much more often: lost answers excuse nothing."""
        return {document: times - 1 for document, times in self.paid.items() if times > 1}


@dataclass
class StoredFile:
    """A file that was uploaded, and when by the simulator's clock."""

    id: str
    name: str
    external_file_id: str | None
    content: bytes
    made: float

    def as_json(self, expires_at: datetime) -> dict[str, Any]:
        """As the API shows it."""
        kind = self.name.rsplit(".", 1)[-1]
        return {
            "id": self.id,
            "name": self.name,
            "project_id": "prj-1",
            "external_file_id": self.external_file_id,
            "file_type": kind,
            "purpose": "parse",
            "expires_at": expires_at.isoformat(),
        }


@dataclass
class ParseJob:
    """A job that was made, when, and what is to become of it."""

    id: str
    file: StoredFile
    body: dict[str, Any]
    made: float
    made_at: datetime
    ending: Ending
    failed_pages: frozenset[int]
    cost: int
    told: list[str] = field(default_factory=list)
