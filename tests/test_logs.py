"""Log lines: what a task is about stands on each, and nothing secret does."""

from __future__ import annotations

import json
import subprocess
import sys
from uuid import UUID

import pytest

PROGRAM = """
import sys
import structlog
from upload_pipeline.logs import configure_logs, log_fields
from upload_pipeline.settings import load_settings

configure_logs(load_settings(log_format=sys.argv[1], log_level=sys.argv[2]))
log = structlog.get_logger("test")
from uuid import UUID
log_fields.set({"job_id": UUID(int=7), "stage": "parsing"})
log.debug("too_quiet")
log.warning("step_failed", code="PARSE_EMPTY")
try:
    url = "postgresql://somebody:hunter2@db/x"
    raise RuntimeError("broken")
except RuntimeError:
    log.exception("step_crashed")
"""


def lines_of(log_format: str, log_level: str = "info") -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format, log_level], capture_output=True, text=True, check=True
    )
    assert done.stdout == "", "standard output is the command's own"
    return done.stderr


def test_a_json_line_has_the_fields_of_its_task() -> None:
    failed, crashed = map(json.loads, lines_of("json").splitlines())
    assert failed["event"] == "step_failed"
    assert (failed["job_id"], failed["stage"]) == (str(UUID(int=7)), "parsing")
    assert (failed["level"], failed["code"]) == ("warning", "PARSE_EMPTY")
    assert crashed["exception"][0]["exc_type"] == "RuntimeError"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_local_variables(log_format: str) -> None:
    text = lines_of(log_format)
    assert "RuntimeError" in text
    assert "hunter2" not in text.replace('url = "postgresql://somebody:hunter2@db/x"', ""), "source is, values are not"


def test_lines_below_the_level_are_not_written() -> None:
    assert "too_quiet" in lines_of("json", "debug")
    assert "too_quiet" not in lines_of("json", "info")
