"""What a hosted provider's answer tells of its limits: `x-ratelimit-…` and `Retry-After`, read into numbers."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h|d)")
_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 7 * 86400.0
"""Longest time that is believed, in seconds; what says more says at least this."""
_LARGEST = 10**15


@dataclass(frozen=True, slots=True)
class RateLimits:
    """What one answer told; each None where it told nothing.

    Attributes:
        requests: allowed in a minute.
        requests_remaining: of these, at the time of the answer.
        requests_reset: seconds until all of them are free again.
        tokens: allowed in a minute.
        tokens_remaining: of these, at the time of the answer.
        tokens_reset: seconds until all of them are free again.
        retry_after: seconds in which nothing more is to be sent.
    """

    requests: int | None = None
    requests_remaining: int | None = None
    requests_reset: float | None = None
    tokens: int | None = None
    tokens_remaining: int | None = None
    tokens_reset: float | None = None
    retry_after: float | None = None


def read_rate_limits(headers: Mapping[str, str], *, now: datetime | None = None) -> RateLimits:
    """Reads the headers of an answer. What cannot be read counts as not told: a header never fails a call.

    Args:
        headers: names in any case.
        now: for a `Retry-After` that is a date; the present where it is not given.
    """
    lower = {name.lower(): value for name, value in headers.items()}

    def number(name: str, least: int) -> int | None:
        value = _number(lower.get(f"x-ratelimit-{name}"))
        return None if value is None or value < least else int(min(value, _LARGEST))

    def seconds(name: str) -> float | None:
        value = parse_seconds(lower.get(f"x-ratelimit-{name}", ""))
        # so long a time is no time that is left: some servers send a moment
        return None if value is None or value >= _LONGEST else value

    return RateLimits(
        # servers without limits send 0 or -1
        requests=number("limit-requests", 1),
        requests_remaining=number("remaining-requests", 0),
        requests_reset=seconds("reset-requests"),
        tokens=number("limit-tokens", 1),
        tokens_remaining=number("remaining-tokens", 0),
        tokens_reset=seconds("reset-tokens"),
        retry_after=_retry_after(lower, now or datetime.now(UTC)),
    )


def parse_seconds(text: str) -> float | None:
    """Seconds of a duration as Go writes it (`250ms`, `1s`, `6m0s`, `1h2m3.5s`), or of a plain number; or None."""
    text = text.strip()
    plain = _number(text)
    if plain is not None:
        return min(plain, _LONGEST) if plain >= 0 else None
    parts = _PART.findall(text)
    if not parts or "".join(size + unit for size, unit in parts) != text:
        return None
    return float(min(sum(float(size) * _UNIT_SECONDS[unit] for size, unit in parts), _LONGEST))


def key_id_of(api_key: str) -> str:
    """What names an API key in the database: 16 hex digits of its SHA-256, from which it cannot be guessed."""
    return hashlib.sha256(api_key.encode()).hexdigest()[:16]


def _retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None and milliseconds >= 0:
        return min(milliseconds / 1000, _LONGEST)
    text = headers.get("retry-after", "")
    told = parse_seconds(text)
    if told is not None or not text:
        return told
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)  # RFC 9110, section 5.6.7: always GMT
        return min(max(0.0, (date - now).total_seconds()), _LONGEST)
    except (ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
