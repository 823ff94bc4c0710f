from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "build-error-table"


def test_the_table_of_the_document_is_the_one_that_the_codes_make() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
