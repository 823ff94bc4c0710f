"""Who pays for a request that several jobs shared: each for its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID, uuid4

from upload_pipeline.database.usage import Usage


def usage_of_request(*, provider: str, model: str, weights: Mapping[UUID, int], tokens: int | None) -> list[Usage]:
    """One record for each job that had texts in a request; the call itself stands in that of the first.

    Args:
        model: as prices name it.
        weights: the tokens of each job's texts, as far as they are known before.
        tokens: as the provider counted all of them; None where it did not say: then the weights are taken.
    """
    jobs = list(weights)
    shares = split_tokens(tokens, list(weights.values())) if tokens is not None else list(weights.values())
    return [
        Usage(uuid4(), provider, model, "embed", job_id=job, requests=int(place == 0), tokens=share)
        for place, (job, share) in enumerate(zip(jobs, shares, strict=True))
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
