from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from io import StringIO
from uuid import UUID

import pytest
from rich.console import Console

from upload_pipeline.cli.output import ago, counted, print_json, seconds_text, size_text, table
from upload_pipeline.cli.search import excerpt

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("past", "text"),
    [
        (timedelta(seconds=0), "0 s ago"),
        (timedelta(seconds=59.9), "59 s ago"),
        (timedelta(minutes=1), "1 min ago"),
        (timedelta(hours=23, minutes=59), "23 h ago"),
        (timedelta(days=400), "400 d ago"),
        (timedelta(seconds=-5), "in 5 s"),
    ],
)
def test_ago_takes_the_largest_unit(past: timedelta, text: str) -> None:
    assert ago(NOW - past, NOW) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KB"), (25 * 1024**2, "25.0 MB"), (5 * 1024**4, "5120.0 GB")],
)
def test_sizes_take_the_largest_unit(count: int, text: str) -> None:
    assert size_text(count) == text


def test_durations_and_counts() -> None:
    assert [seconds_text(value) for value in (0.04, 12.4, 185)] == ["0.0 s", "12 s", "3 min 5 s"]
    assert [counted(value, "file") for value in (0, 1, 1200)] == ["0 files", "1 file", "1,200 files"]


def test_json_has_times_in_utc_and_whole_ids_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    job = UUID("6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11")
    print_json({"at": NOW, "id": job, "text": "a\nb ü"})
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"at": "2026-05-01T12:00:00Z", "id": str(job), "text": "a\nb ü"}


def test_an_excerpt_is_one_line_cut_at_a_word() -> None:
    assert excerpt("one\n\ntwo   three", limit=100) == "one two three"
    assert excerpt("one two three", limit=9) == "one two …"


def test_a_narrow_terminal_goes_without_spare_columns_and_keeps_ids_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    job = "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"
    for width, headings in ((60, ["JOB", "STATE", "FILE"]), (100, ["JOB", "STATE", "AGE", "FILE"])):
        console = Console(width=width, file=StringIO())
        monkeypatch.setattr("upload_pipeline.cli.output.out", lambda console=console: console)
        console.print(table(("JOB", "STATE", "AGE", "FILE"), [(job, "deadletter", "3 min", "x" * 80)], spare=("AGE",)))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert lines[0].split() == headings
        assert lines[1].startswith(f"{job}  deadletter")
        assert lines[1].rstrip().endswith("…")
