from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from uuid import uuid4

import psycopg
from command_runs import Ended, Terminal
from postgres_servers import Database

KEYS = {"path", "document_id", "job_id", "state", "stage", "chunks", "duplicate", "seconds", "error"}


def _by_name(ended: Ended) -> dict[str, dict[str, object]]:
    return {Path(line["path"]).name: line for line in ended.lines()}


def test_good_files_become_searchable_and_bad_ones_are_refused_by_name(
    terminal: Terminal, files: Path, user: str
) -> None:
    ended = terminal("ingest", files, "--user", user, "--json")
    assert ended.status == 1
    lines = _by_name(ended)
    assert set(lines) == {"roof.md", "note.txt", "faq.html", "photo.pdf", "nothing.txt"}
    assert all(set(line) == KEYS for line in lines.values())
    for name in ("roof.md", "note.txt", "faq.html"):
        line = lines[name]
        assert (line["state"], line["stage"], line["error"], line["duplicate"]) == ("done", "embedded", None, False)
        assert line["chunks"] == 1
        assert line["seconds"] > 0
    assert lines["nothing.txt"]["error"]["code"] == "EMPTY_FILE"
    for name in ("photo.pdf", "nothing.txt"):
        assert (lines[name]["state"], lines[name]["job_id"], lines[name]["chunks"]) == ("refused", None, None)
        assert lines[name]["error"]["message"]

    again = terminal("ingest", files / "roof.md", files / "below", "--user", user, "--json")
    assert again.status == 0
    first, second = _by_name(again)["roof.md"], _by_name(again)["deep.txt"]
    assert (first["duplicate"], first["state"], first["job_id"]) == (True, "done", lines["roof.md"]["job_id"])
    assert (second["duplicate"], second["state"]) == (False, "done")

    found = terminal("search", "cracked shingles", "--user", user, "--limit", 2, "--json").object()
    assert set(found) == {"hits", "took_ms"}
    hit = found["hits"][0]
    assert hit["filename"] == "roof.md"
    assert hit["heading_path"] == ["Roof"]
    assert set(hit) == {
        *("chunk_id", "document_id", "filename", "text", "score", "heading_path", "page", "start", "end", "metadata"),
    }

    shown = terminal("search", "cracked shingles", "--user", user, "--limit", 1)
    assert shown.status == 0
    assert "1. roof.md" in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert terminal("search", "cracked shingles", "--user", "00000000-0000-4000-8000-00000000ffff").out == ""


def test_two_files_of_the_same_bytes_share_a_job_and_both_are_reported(
    terminal: Terminal, files: Path, user: str
) -> None:
    (files / "copy.md").write_bytes((files / "roof.md").read_bytes())
    ended = terminal("ingest", files / "roof.md", files / "copy.md", files / "missing.md", "--user", user, "--json")
    lines = _by_name(ended)
    assert ended.status == 1
    assert lines["roof.md"]["job_id"] == lines["copy.md"]["job_id"]
    assert {lines["roof.md"]["state"], lines["copy.md"]["state"]} == {"done"}
    assert lines["missing.md"]["error"]["code"] == "FILE_NOT_FOUND"


def test_piped_lines_are_plain_with_failures_on_standard_error(terminal: Terminal, files: Path, user: str) -> None:
    ended = terminal("ingest", files, "--user", user, "--metadata", "year=2026")
    assert ended.status == 1
    assert "\x1b" not in ended.out + ended.err
    assert [line.split()[0] for line in ended.out.splitlines()[:3]] == ["done"] * 3
    assert ended.out.splitlines()[3].startswith("5 files, 3 done, 2 failed, 3 chunks in ")
    failed = [line for line in ended.err.splitlines() if line.startswith("failed")]
    assert len(failed) == 2
    assert any("EMPTY_FILE" in line and "nothing.txt" in line for line in failed)
    documents = terminal("documents", "--user", user, "--json").lines()
    assert [document["metadata"] for document in documents] == [{"year": "2026"}] * 3


def test_no_wait_leaves_the_work_and_a_later_call_does_it(terminal: Terminal, files: Path, user: str) -> None:
    ended = terminal("ingest", files / "roof.md", "--user", user, "--no-wait", "--json")
    line = ended.object()
    assert ended.status == 0
    assert (line["state"], line["stage"], line["chunks"]) == ("queued", "queued", None)

    job = line["job_id"]
    refused = terminal("retry", job)
    assert refused.status == 1
    assert refused.err.startswith("INVALID_STATE: ")
    assert "cancel it first" in refused.err
    assert terminal("cancel", job, "--json").object() == {"job_id": job, "state": "cancelled", "cancel_requested": True}
    failed = terminal("ingest", files / "roof.md", "--user", user, "--json")
    assert failed.status == 1
    assert failed.object()["state"] == "cancelled"
    assert f"upload-pipeline retry {job}" in failed.object()["error"]["message"]
    assert terminal("retry", job, "--json").object() == {"job_id": job, "stage": "queued", "state": "queued"}

    resumed = terminal("ingest", files / "roof.md", "--user", user, "--json")
    assert resumed.status == 0
    assert resumed.object() | {"seconds": 0} == line | {
        "state": "done",
        "stage": "embedded",
        "chunks": 1,
        "duplicate": True,
        "seconds": 0,
    }


def test_it_works_itself_where_the_workers_that_run_have_left_the_work_to_others(
    terminal: Terminal, files: Path, user: str, database: Database
) -> None:
    with psycopg.connect(database.worker_url, autocommit=True) as worker:
        keyless = uuid4()
        worker.execute(
            "select upload_pipeline.register_worker(%s, %s, %s, 'v', '{default}', 1)",
            [keyless, socket.gethostname(), os.getpid()],
        )
        worker.execute("select upload_pipeline.leave_pools(%s, '{default}')", [keyless])
    given = {"database_url": database.worker_url, "lease_ttl": "600"}
    ended = terminal("ingest", files / "roof.md", "--user", user, "--json", **given)
    assert ended.object()["state"] == "done"


def test_ctrl_c_hands_everything_back_and_the_same_command_goes_on(
    terminal: Terminal, tmp_path: Path, user: str
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(80):
        (folder / f"{number:02}.txt").write_text(f"Report {number} for {user}. " + "The roof was inspected. " * 200)
    with terminal.running("ingest", folder, "--user", user, "--json") as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert first["state"] == "done"
    assert process.returncode == 130
    assert "goes on where this stopped" in err
    assert "Traceback" not in err
    ended_before = 1 + len(out.splitlines())
    assert ended_before < 80
    jobs = terminal("jobs", "--user", user, "--limit", 100, "--json").lines()
    assert {job["state"] for job in jobs} <= {"done", "queued"}
    assert all(job["worker_id"] is None for job in jobs)
    assert sum(job["state"] == "done" for job in jobs) >= ended_before

    resumed = terminal("ingest", folder, "--user", user, "--json")
    assert resumed.status == 0
    assert len(resumed.lines()) == 80
    assert sum(line["duplicate"] for line in resumed.lines()) == len(jobs)
    assert {line["state"] for line in resumed.lines()} == {"done"}
