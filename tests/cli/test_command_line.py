from __future__ import annotations

from pathlib import Path

import pytest
from command_runs import Terminal
from typer.testing import CliRunner

from upload_pipeline.cli.app import app

JOB = "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"
COMMANDS = [
    *(["ingest"], ["search"], ["jobs"], ["job"], ["retry"], ["cancel"], ["documents"], ["delete"], ["worker"], ["up"]),
    *(["migrate"], ["maintenance"], ["doctor"], ["database", "url"], ["database", "psql"], ["database", "stop"]),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_examples(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"upload-pipeline {' '.join(command)}" in result.output.partition("Examples:")[2]


def test_the_root_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert {command[0] for command in COMMANDS} <= set(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["job", "xyz"], "JOB_ID"),
        (["retry"], "JOB_ID"),
        (["delete", "1234"], "DOCUMENT_ID"),
        (["ingest"], "PATH"),
        (["ingest", "x.txt", "--user", "me"], "--user"),
        (["ingest", "x.txt", "--metadata", "novalue"], "K=V"),
        (["ingest", "x.txt", "--metadata", "a=1", "--metadata", "a=2"], "twice"),
        (["search", "x", "--mode", "psychic"], "hybrid"),
        (["search", "x", "--limit", "0"], "--limit"),
        (["jobs", "--state", "lost"], "deadletter"),
        (["worker", "--concurrency", "0"], "--concurrency"),
        (["fly"], "fly"),
    ],
)
def test_wrong_usage_exits_2_and_names_what_is_wrong(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert named in result.stderr
    assert "Traceback" not in result.output


def test_a_folder_without_files_is_wrong_usage_with_a_hint(bare_terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "folders" / "below").mkdir(parents=True)
    ended = bare_terminal("ingest", tmp_path / "folders")
    assert ended.status == 2
    assert "--recursive" in ended.err


def test_a_bad_setting_stops_with_its_name_and_what_is_allowed(bare_terminal: Terminal) -> None:
    ended = bare_terminal("jobs", worker_concurrency="many")
    assert ended.status == 2
    assert ended.out == ""
    assert "UPLOAD_PIPELINE_WORKER_CONCURRENCY='many'" in ended.err
    assert "Traceback" not in ended.err


def test_a_bad_setting_is_an_object_with_json(bare_terminal: Terminal) -> None:
    ended = bare_terminal("jobs", "--json", worker_concurrency="many")
    assert ended.status == 2
    assert ended.object()["error"]["code"] == "SETTING_INVALID"
    assert ended.err == ""


def test_a_home_that_cannot_be_made_is_named(bare_terminal: Terminal) -> None:
    ended = bare_terminal("documents")
    assert ended.status == 2
    assert "UPLOAD_PIPELINE_HOME" in ended.err
    assert "Traceback" not in ended.err


def test_metadata_that_cannot_be_kept_is_wrong_usage(bare_terminal: Terminal) -> None:
    ended = bare_terminal("ingest", "x.txt", "--metadata", f"{'k' * 200}=1", "--json")
    assert ended.status == 2
    assert ended.object()["error"]["code"] == "INVALID_METADATA"


def test_a_reader_that_leaves_ends_the_command_quietly(terminal: Terminal, files: Path, user: str) -> None:
    terminal("ingest", files, "--user", user, "--no-wait")
    with terminal.running("jobs", "--user", user, "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
