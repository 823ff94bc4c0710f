"""Who pays for a request that several jobs shared: each for its texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from upload_pipeline.database.usage import Usage

if TYPE_CHECKING:
    from upload_workers.embedding_line import Item


def usage_of_request(part: Sequence[Item], *, provider: str, model: str, tokens: int | None) -> list[Usage]:
    """One record for each job that had texts in a request; the call itself stands in that of the first.

    A text that two jobs wait for is the first's, and costs the others nothing. One that nobody waits for any more,
    since its job was cancelled or has lost its lease, is still that job's.

    Args:
        part: the texts, with those who wait for them now.
        model: as prices name it.
        tokens: as the provider counted all of them; None where it did not say: then what they were bound by is taken.
    """
    weights: dict[tuple[UUID, UUID], int] = {}
    cached: Counter[tuple[UUID, UUID]] = Counter()
    for item in part:
        for number, job_id in enumerate([ticket.job.job_id for ticket, _ in item.waiting] or [item.asked_by]):
            who = (job_id, item.user_id)
            weights[who] = weights.get(who, 0) + (0 if number else item.tokens)
            cached[who] += number > 0
    shares = list(weights.values()) if tokens is None else split_tokens(tokens, list(weights.values()))
    return [
        Usage(
            uuid4(),
            provider,
            model,
            "embed",
            job_id=job_id,
            user_id=user_id,
            requests=int(place == 0),
            tokens=share,
            cached=cached[job_id, user_id],
        )
        for place, ((job_id, user_id), share) in enumerate(zip(weights, shares, strict=True))
    ]


def split_tokens(tokens: int, weights: Sequence[int]) -> list[int]:
    """Whole parts in proportion to the weights, whose sum is `tokens`; equal ones where nothing weighs anything.

    Args:
        weights: not empty, none below 0.
    """
    total = sum(weights)
    if not total:
        weights, total = [1] * len(weights), len(weights)
    # the difference of rounded running sums: no part is off by more than one, and nothing is lost
    parts, running, given = [], 0, 0
    for weight in weights:
        running += weight
        upto = tokens * running // total
        parts.append(upto - given)
        given = upto
    return parts
