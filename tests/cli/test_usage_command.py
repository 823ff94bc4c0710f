"""Usage and its cost, from the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from command_runs import Terminal

from upload_pipeline.database.embedded import ensure_embedded


@pytest.fixture
def recorded(home: Path, terminal: Terminal, user: str) -> str:
    """A user who has used something with a price, and something without."""
    terminal("usage")  # brings the database to its schema
    common: dict[str, Any] = {"user_id": user, "provider": "hosted", "operation": "embed", "requests": 2}
    records = [
        {**common, "usage_id": str(uuid4()), "model": "m", "tokens": 1234567, "cost_micros": 24691.34},
        {**common, "usage_id": str(uuid4()), "model": "free", "pages": 3, "cached": 4},
    ]
    with psycopg.connect(ensure_embedded(home).worker_url, autocommit=True) as db:
        db.execute("select upload_pipeline.record_usage(%s)", [json.dumps(records)])
    return user


def test_usage_is_shown_by_what_is_asked_for(terminal: Terminal, recorded: str) -> None:
    by_model = terminal("usage", "--user", recorded, "--by", "model", "--json").lines()
    assert [(line["model"], line["cost_usd"], line["unpriced"]) for line in by_model] == [
        ("hosted/m", 0.02469134, 0),
        ("hosted/free", None, 1),
    ]
    (by_user,) = terminal("usage", "--user", recorded, "--by", "user", "--json").lines()
    assert (by_user["user"], by_user["requests"], by_user["pages"], by_user["cached"]) == (recorded, 4, 3, 4)
    shown = terminal("usage", "--user", recorded)
    assert "0.0247*" in shown.out
    assert "1,234,567" in shown.out
    assert "1 record without a price" in shown.err


def test_a_time_without_usage_and_a_time_that_is_none(terminal: Terminal, recorded: str) -> None:
    assert "No usage" in terminal("usage", "--user", recorded, "--to", "2020-01-01").err
    assert terminal("usage", "--user", UUID(int=5), "--json").out == ""
    wrong = terminal("usage", "--from", "2020-01-02", "--to", "2020-01-01")
    assert (wrong.status != 0, "INVALID_ARGUMENT" in wrong.err) == (True, True)


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        ('{"openai/x": {"tokns": 1}}', '"openai/x" has a price for "tokns"'),
        ('{"openai": {"tokens": 1}}', '"openai" is no model of a provider'),
        ('{"openai/x": {}}', "has no price"),
        ('{"openai/x": {"tokens": -1}}', "not below 0"),
        ('{"openai/x": {"tokens": "much"}}', "valid number"),
        ("{openai", "is not JSON"),
    ],
)
def test_prices_that_make_no_sense_stop_the_start(bare_terminal: Terminal, prices: str, said: str) -> None:
    ended = bare_terminal("usage", prices=prices)
    assert ended.status != 0
    assert "UPLOAD_PIPELINE_PRICES" in ended.err
    assert said in ended.err
