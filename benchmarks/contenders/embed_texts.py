"""What the contenders of `scripts/bench embed` embed: texts of some 900 characters, all different, always the same."""

from __future__ import annotations

import random
from dataclasses import dataclass

MODEL = "text-embedding-3-small"
DIMENSIONS = 1536
BATCH = 256
"""Texts of a request."""

_WORDS = (
    "insurance",
    "policy",
    "water",
    "damage",
    "claim",
    "deductible",
    "premium",
    "roof",
    "hail",
    "storm",
    "repair",
    "kitchen",
    "pipe",
    "adjuster",
    "estimate",
    "invoice",
    "coverage",
    "exclusion",
    "liability",
    "vehicle",
    "collision",
    "driver",
    "witness",
    "report",
    "deadline",
    "appeal",
    "decision",
    "payment",
    "transfer",
    "account",
    "document",
    "archive",
    "section",
    "paragraph",
    "signature",
    "notary",
    "evidence",
    "photograph",
    "inspection",
    "contractor",
    "material",
    "labour",
    "schedule",
)


@dataclass(frozen=True)
class Race:
    """One contender's task.

    Attributes:
        url: of the database, as its owner.
        api_url: of the embedder.
        api_key: that it takes.
        texts: how many.
        concurrency: requests at once.
    """

    url: str
    api_url: str
    api_key: str
    texts: int
    concurrency: int


def made_texts(count: int) -> list[str]:
    """So many texts."""
    chance = random.Random(11)
    return [f"{number}: {' '.join(chance.choices(_WORDS, k=110))}." for number in range(count)]
