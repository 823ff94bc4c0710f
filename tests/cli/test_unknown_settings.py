"""A setting whose name is misspelt is named, and does not stop anything."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from command_runs import Terminal

from upload_pipeline.cli.unknown_settings import explain_unknown
from upload_pipeline.settings import Settings


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("UPLOAD_PIPELINE_WORKER_POOL", "UPLOAD_PIPELINE_WORKER_POOLS"),
        ("UPLOAD_PIPELINE_DATABSE_URL", "UPLOAD_PIPELINE_DATABASE_URL"),
        ("upload_pipeline_lease_tll", "UPLOAD_PIPELINE_LEASE_TTL"),
        ("UPLOAD_PIPELINE_", "doctor --show"),
        ("UPLOAD_PIPELINE_QQQ", "doctor --show"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_setting(name: str, meant: str) -> None:
    (line,) = explain_unknown([name, "PATH", "UPLOAD_PIPELINER"])
    assert line.startswith(f"{name} is no setting")
    assert meant in line


def test_every_setting_is_known_in_any_case() -> None:
    names = [f"UPLOAD_PIPELINE_{field}" for field in Settings.model_fields]
    assert explain_unknown([*names, *(name.upper() for name in names), *(name.lower() for name in names)]) == []


def test_doctor_names_what_stands_in_the_environment_and_in_the_file(terminal: Terminal) -> None:
    (terminal.directory / ".env").write_text("UPLOAD_PIPELINE_STORAGE_URI=file:///nowhere\nOTHER=1\n")
    report = terminal("doctor", "--json", poll_mx="secret value")
    assert report.status == 1
    ill = [check["message"] for check in report.object()["checks"] if not check["ok"]]
    assert [line.split()[0] for line in ill] == ["UPLOAD_PIPELINE_POLL_MX", "UPLOAD_PIPELINE_STORAGE_URI"]
    assert "UPLOAD_PIPELINE_STORAGE_URL" in ill[1]
    assert "secret value" not in report.out + report.err


def test_a_worker_says_so_in_its_log_and_works(terminal: Terminal, tmp_path: Path) -> None:
    with terminal.running("worker", log_format="json", stage_timout="5") as process:
        lines: list[str] = []
        while "worker_started" not in (line := process.stderr.readline() if process.stderr else ""):
            assert line, "".join(lines)
            lines.append(line)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert [line for line in lines if "unknown_setting" in line and "UPLOAD_PIPELINE_STAGE_TIMEOUT meant" in line]
