"""The caps of users, listed and set from the terminal."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from command_runs import Terminal


def test_a_cap_is_set_listed_and_set_again(terminal: Terminal, user: str) -> None:
    first = terminal("lanes", "set", "--user", user, "--max-in-flight", 8)
    assert first.out == f"At most 8 jobs of {user} at work at once in pool default.\n"
    again = terminal("lanes", "set", "--user", user, "--pool", "default", "--max-in-flight", 1, "--json")
    assert again.object() == {"user_id": user, "pool": "default", "max_in_flight": 1}
    assert terminal("lanes", "list", "--user", user, "--json").lines() == [
        {"pool": "default", "user_id": user, "max_in_flight": 1, "working": 0, "ready": False}
    ]
    assert user in terminal("lanes", "list").out
    assert "No lanes" in terminal("lanes", "list", "--user", uuid4()).err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--pool": "nowhere"}, "No stage has the pool 'nowhere'. The pools are: background, default"),
        ({"--user": str(UUID(int=0))}, "nil UUID"),
    ],
)
def test_a_cap_that_would_do_nothing_is_refused(
    terminal: Terminal, user: str, changed: dict[str, str], said: str
) -> None:
    options = {"--user": user, "--pool": "default", "--max-in-flight": "3", **changed}
    ended = terminal("lanes", "set", *(word for option in options.items() for word in option))
    assert ended.status != 0
    assert "INVALID_ARGUMENT" in ended.err
    assert said in ended.err
    assert terminal("lanes", "list", "--user", options["--user"], "--json").lines() == []


def test_a_cap_below_one_is_no_cap(terminal: Terminal, user: str) -> None:
    assert terminal("lanes", "set", "--user", user, "--max-in-flight", 0).status == 2
