"""Credentials from the terminal, and the service that takes them, in processes of its own."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from command_runs import Terminal
from postgres_servers import Database


@contextmanager
def served(terminal: Terminal, *arguments: object, **settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The service on a free port; its URL, once it answers."""
    with terminal.running("serve", "--port", 0, *arguments, **settings) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"API at (http://\S+),", line):
                yield found[1], process
                return
        raise AssertionError(f"serve ended with {process.wait()}")


def test_a_token_and_a_key_open_the_service_until_the_key_is_revoked(terminal: Terminal, user: str) -> None:
    token = terminal("token", "--user", user).out.strip()
    made = terminal("keys", "create", "--user", user, "--name", "importer", "--role", "ADMIN", "--json").object()
    with served(terminal) as (url, process):
        with httpx.Client(base_url=url) as client:
            assert client.get("/api/v2/jobs").status_code == 401
            by_token = client.get("/api/v2/jobs", headers={"Authorization": f"Bearer {token}"})
            assert (by_token.status_code, by_token.json()["items"]) == (200, [])
            by_key = {"X-API-Key": made["key"]}
            assert client.get("/api/v2/jobs", headers=by_key).status_code == 200
            (listed,) = terminal("keys", "list", "--user", user, "--json").lines()
            assert (listed["key_id"], listed["roles"], listed["name"]) == (made["key_id"], ["ADMIN"], "importer")
            assert listed["last_used_at"] is not None
            assert made["key"] not in terminal("keys", "list").out
            assert terminal("keys", "revoke", made["key_id"]).out == f"Key {made['key_id']} is revoked.\n"
            assert client.get("/api/v2/jobs", headers=by_key).status_code == 401
            assert client.get("/readyz").json()["status"] == "ready"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert made["key"] not in said
    assert token not in said


def test_a_key_is_shown_once_and_in_words(terminal: Terminal, user: str) -> None:
    made = terminal("keys", "create", "--user", user, "--name", "by hand", "--expires-in-days", "1")
    assert re.fullmatch(r"upk_[0-9a-f]{12}_[\w-]{43}\n", made.out)
    assert "not shown again" in made.err
    shown = terminal("keys", "list", "--user", user).out
    assert "by hand" in shown
    assert "good" in shown
    again = terminal("keys", "revoke", str(uuid4()))
    assert (again.status, again.err.startswith("INVALID_ARGUMENT: ")) == (2, True)
    assert terminal("keys", "create", "--user", user, "--name", "").status == 2


def test_up_serves_and_works(terminal: Terminal, files: Path, user: str) -> None:
    token = {"Authorization": f"Bearer {terminal('token', '--user', user).out.strip()}"}
    with terminal.running("up", "--port", 0) as process:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"API at (http://\S+),", line)))
        line = terminal("ingest", files / "roof.md", "--user", user, "--no-wait", "--json").object()
        for _ in range(300):
            job = httpx.get(f"{url}/api/v2/jobs", headers=token).json()["items"][0]
            if job["state"] == "done":
                break
            time.sleep(0.1)
        assert (job["job_id"], job["state"]) == (line["job_id"], "done")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"database_url": "postgresql://upload_worker@127.0.0.1:1/d", "connect_timeout": "1"}, "DATABASE_UNAVAILABLE"),
        ({"database_url": "nonsense"}, "SETTING_INVALID"),
        ({"api_port": "70000"}, "SETTING_INVALID"),
        ({"jwt_secret": "short", "jwt_issuer": "https://x.test"}, "SETTING_INVALID"),
        ({"storage_url": "file:///dev/null/storage"}, "STORAGE"),
    ],
)
def test_serve_does_not_start_on_what_cannot_work(terminal: Terminal, settings: dict[str, str], code: str) -> None:
    ended = terminal("serve", **({"api_port": "0"} | settings))
    assert ended.status == 2, ended.err
    assert code in ended.err
    assert "Traceback" not in ended.err
    assert "short" not in ended.err.replace("too short", "")


def test_serve_does_not_start_on_a_schema_that_is_behind_or_an_address_that_is_taken(
    terminal: Terminal, empty_database: Database
) -> None:
    behind = terminal("serve", database_url=empty_database.admin_url, api_port="0")
    assert (behind.status, "MIGRATIONS_PENDING" in behind.err) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        occupied = terminal("serve", "--port", taken.getsockname()[1])
    assert (occupied.status, "SETTING_INVALID" in occupied.err) == (2, True)


def test_doctor_warns_where_others_reach_tokens_for_development(terminal: Terminal) -> None:
    def said(**settings: str) -> dict[str, object]:
        report = terminal("doctor", "--json", **settings).object()
        return next(check for check in report["checks"] if check["check"] == "api")

    assert said()["ok"] is True
    exposed = said(api_host="::")
    assert exposed["ok"] is False
    assert "JWT_ISSUER" in str(exposed["message"])
    assert said(api_host="::", jwt_issuer="https://x.test/auth/v1")["ok"] is True


def test_serve_says_so_too(terminal: Terminal) -> None:
    with terminal.running("serve", "--port", 0, "--host", "::") as process:
        assert process.stderr is not None
        assert any("WARNING" in line and "JWT_ISSUER" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_token_is_not_made_where_somebody_else_signs(terminal: Terminal) -> None:
    refused = terminal("token", jwt_issuer="https://x.test/auth/v1")
    assert refused.status == 2
    assert "keys create" in refused.err
