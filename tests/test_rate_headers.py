"""What a provider's headers are read as, and what is not believed."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from upload_pipeline.rate_headers import RateLimits, key_id_of, parse_seconds, read_rate_limits

NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1), ("6m0s", 360), ("250ms", 0.25), ("12ms", 0.012), ("1h2m3.5s", 3723.5), ("0s", 0), ("500us", 0.0005),
        ("500µs", 0.0005), ("2d", 172800), (".5s", 0.5), (" 7 ", 7), ("0.25", 0.25),
        ("", None), ("soon", None), ("1s later", None), ("-1s", None), ("-3", None), ("nan", None), ("inf", None),
        ("1s2", None), ("ms", None),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_seconds(text) == (None if seconds is None else pytest.approx(seconds))


def test_an_answer_tells_all_six_numbers() -> None:
    headers = {
        "X-RateLimit-Limit-Requests": "3000",
        "x-ratelimit-remaining-requests": "2999",
        "x-ratelimit-reset-requests": "20ms",
        "x-ratelimit-limit-tokens": "1000000",
        "x-ratelimit-remaining-tokens": "998976",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    assert read_rate_limits(headers, now=NOW) == RateLimits(3000, 2999, 0.02, 1_000_000, 998_976, 360)


def test_headers_that_make_no_sense_tell_nothing() -> None:
    headers = {
        "x-ratelimit-limit-requests": "-1",
        "x-ratelimit-limit-tokens": "0",
        "x-ratelimit-remaining-requests": "many",
        "x-ratelimit-remaining-tokens": "-5",
        "x-ratelimit-reset-requests": "1795000000",
        "retry-after": "in a while",
    }
    assert read_rate_limits(headers, now=NOW) == RateLimits()
    assert read_rate_limits({}, now=NOW) == RateLimits()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2"}, 2),
        ({"Retry-After": "300"}, 300),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Fri, 20 Nov 2026 12:00:30 GMT"}, 30),
        ({"retry-after": "Fri, 20 Nov 2026 11:00:00 GMT"}, 0),
        ({"retry-after": "99999999999"}, 7 * 86400),
        ({"retry-after": "-1"}, None),
    ],
)
def test_retry_after_in_its_three_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert read_rate_limits(headers, now=NOW).retry_after == seconds


def test_a_key_is_named_by_what_does_not_give_it_away() -> None:
    name = key_id_of("sk-secret")
    assert len(name) == 16
    assert int(name, 16) >= 0
    assert name == key_id_of("sk-secret") != key_id_of("sk-other")
    assert "secret" not in name
