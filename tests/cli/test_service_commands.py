from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psycopg
from command_runs import Terminal
from postgres_servers import Database, temporary_home

from upload_pipeline.database.embedded import embedded_status, stop_embedded


def _worker_of(url: str, pid: int) -> str | None:
    with psycopg.connect(url) as connection:
        row = connection.execute("select worker_id from upload_pipeline.workers where pid = %s", (pid,)).fetchone()
    return None if row is None else str(row[0])


def _wait_for_worker(url: str, process: subprocess.Popen[str]) -> str:
    for _ in range(200):
        found = _worker_of(url, process.pid)
        if found is not None:
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the worker never entered the register")


def test_ingest_leaves_the_work_to_a_running_worker_which_ends_on_term(
    terminal: Terminal, files: Path, user: str
) -> None:
    url = terminal("database", "url", "--json").object()["url"]
    with terminal.running("worker", "--concurrency", "2") as process:
        worker = _wait_for_worker(url, process)
        line = terminal("ingest", files / "roof.md", "--user", user, "--json").object()
        assert line["state"] == "done"
        events = terminal("job", line["job_id"], "--json").object()["events"]
        assert {event["worker_id"] for event in events if event["code"] == "job_claimed"} == {worker}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert _worker_of(url, process.pid) is None


def test_up_starts_and_stops_the_database_that_was_not_running(terminal: Terminal) -> None:
    with temporary_home() as home:
        with terminal.running("up", "--port", 0, home=str(home)) as process:
            for _ in range(400):
                if "worker_started" in (line := process.stderr.readline() if process.stderr else ""):
                    break
                assert line, "up ended early"
            assert embedded_status(home).ready
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert process.returncode == 0
        assert embedded_status(home).pid is None


def test_a_database_of_ones_own_that_is_behind_says_migrate(terminal: Terminal, empty_database: Database) -> None:
    own = {"database_url": empty_database.admin_url}
    behind = terminal("jobs", **own)
    assert behind.status == 1
    assert behind.err.startswith("MIGRATIONS_PENDING: ")
    assert "upload-pipeline migrate" in behind.err
    check = terminal("migrate", "--check", "--json", **own)
    assert check.status == 1
    assert len(check.object()["pending"]) >= 1
    applied = terminal("migrate", "--json", **own)
    assert applied.status == 0
    assert [done["version"] for done in applied.object()["applied"]] == check.object()["pending"]
    assert terminal("migrate", "--check", **own).status == 0
    assert terminal("migrate", **own).out.endswith("is up to date.\n")
    # The role of workers may not read the ledger, and works all the same.
    as_worker = terminal("jobs", "--json", database_url=empty_database.worker_url)
    assert (as_worker.status, as_worker.out) == (0, "")
    assert terminal("database", "stop", **own).status == 2


def test_a_database_that_does_not_answer_is_named_without_its_password(terminal: Terminal) -> None:
    ended = terminal("jobs", database_url="postgresql://u:hunter2@127.0.0.1:1/d")
    assert ended.status == 1
    assert ended.err.startswith("DATABASE_UNAVAILABLE: ")
    assert "hunter2" not in ended.err


def test_psql_speaks_as_the_worker_and_as_the_owner(terminal: Terminal) -> None:
    query = ("-At", "-c", "select current_user")
    assert terminal("database", "psql", *query).out == "upload_worker\n"
    assert terminal("database", "psql", "--admin", *query).out == "postgres\n"


def test_maintenance_reports_what_it_did(terminal: Terminal) -> None:
    report = terminal("maintenance", "--json")
    assert report.status == 0
    assert report.object()["orphans_removed"] == 0
    assert "Orphaned objects removed" in terminal("maintenance").out


def test_stop_ends_the_database_and_the_next_command_starts_it(terminal: Terminal) -> None:
    with temporary_home() as home:
        assert terminal("database", "stop", "--json", home=str(home)).object() == {"stopped": False}
        assert terminal("migrate", "--check", home=str(home)).status == 1
        assert terminal("jobs", "--json", home=str(home)).status == 0
        assert terminal("migrate", "--check", home=str(home)).status == 0
        assert terminal("database", "stop", "--json", home=str(home)).object() == {"stopped": True}
        assert stop_embedded(home) is False
