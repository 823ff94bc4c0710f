from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from command_runs import Terminal


def test_a_done_job_is_listed_shown_restarted_and_deleted(terminal: Terminal, files: Path, user: str) -> None:
    line = terminal("ingest", files / "roof.md", "--user", user, "--json").object()
    job, document = line["job_id"], line["document_id"]

    (listed,) = terminal("jobs", "--user", user, "--state", "done", "--json").lines()
    assert (listed["job_id"], listed["filename"], listed["progress"], listed["error"]) == (job, "roof.md", 100, None)
    assert listed["results"]["chunks"] == 1
    table = terminal("jobs", "--user", user)
    assert table.out.splitlines()[0].split() == ["JOB", "STATE", "STAGE", "CREATED", "FILE"]
    assert table.out.splitlines()[1].startswith(job)
    assert all(line == line.rstrip() and len(line) <= 100 for line in table.out.splitlines())

    shown = terminal("job", job, "--json").object()
    assert {key: shown[key] for key in listed} == listed
    codes = [event["code"] for event in shown["events"]]
    assert codes[0] == "job_enqueued"
    assert codes[-1] == "job_done"
    text = terminal("job", job).out
    assert "roof.md" in text
    assert "job_done" in text
    assert "\x1b" not in text

    without_stage = terminal("retry", job)
    assert without_stage.status == 1
    assert without_stage.err.startswith("INVALID_STATE: ")
    unknown_stage = terminal("retry", job, "--from-stage", "flying", "--json")
    assert unknown_stage.status == 1
    assert unknown_stage.object()["error"]["code"] == "INVALID_STAGE"
    assert "parsing" in unknown_stage.object()["error"]["message"]
    assert terminal("retry", job, "--from-stage", "chunking").out == f"Job {job} starts again at stage chunking.\n"
    assert terminal("ingest", files / "roof.md", "--user", user, "--json").object()["state"] == "done"
    assert "nothing changed" in terminal("cancel", job).out

    (row,) = terminal("documents", "--user", user, "--json").lines()
    assert (row["document_id"], row["chunk_count"], row["state"]) == (document, 1, "done")
    assert document in terminal("documents", "--user", user).out
    assert terminal("delete", document, "--json").object() == {"document_id": document, "deleted": True}
    assert terminal("documents", "--user", user, "--json").lines() == []
    again = terminal("delete", document)
    assert again.status == 1
    assert again.err.startswith("DOCUMENT_NOT_FOUND: ")
    assert terminal("ingest", files / "roof.md", "--user", user, "--json").object()["duplicate"] is False


def test_unknown_jobs_are_named_with_the_remedy(terminal: Terminal) -> None:
    job = uuid4()
    for arguments in (["job", job], ["retry", job], ["cancel", job]):
        ended = terminal(*arguments)
        assert ended.status == 1
        assert ended.err.startswith("JOB_NOT_FOUND: ")
        assert str(job) in ended.err
    assert terminal("job", job, "--json").object()["error"]["code"] == "JOB_NOT_FOUND"


def test_a_job_that_failed_shows_its_error(terminal: Terminal, tmp_path: Path, user: str) -> None:
    # Text to intake, which looks at the beginning; nothing to find for the parser.
    blank = tmp_path / "blank.html"
    blank.write_text(f"<html><body><script>{user}</script></body></html>")
    line = terminal("ingest", blank, "--user", user, "--json").object()
    assert line["state"] == "deadletter"
    assert line["error"]["code"] == "PARSE_EMPTY"
    (listed,) = terminal("jobs", "--state", "deadletter", "--user", user, "--json").lines()
    assert listed["error"] == line["error"]
    assert "PARSE_EMPTY" in terminal("jobs", "--user", user).out


def test_a_list_that_was_cut_says_so(terminal: Terminal, files: Path, user: str) -> None:
    terminal("ingest", files, "--user", user, "--no-wait")
    cut = terminal("jobs", "--user", user, "--limit", 2, "--json")
    assert len(cut.lines()) == 2
    assert "--limit" in cut.err
    assert terminal("jobs", "--user", user, "--limit", 3, "--json").err == ""
