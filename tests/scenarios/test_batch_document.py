"""docs/batch-ingestion.md does what it says: its commands are run, against a service and a worker of their own."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.scenarios.document_reader import ROOT, Reader, blocks
from upload_pipeline.errors import ErrorCode
from upload_pipeline.settings import ENV_PREFIX, Settings


def test_the_commands_run_in_their_order(reader: Reader) -> None:
    for program in ("curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here")
    told = reader.run(["bash", "-euo", "pipefail", "-s"], "\n".join(blocks("batch-ingestion.md", "sh")))
    assert '"total_documents": 5' in told
    assert '"message": "2 files were taken."' in told
    assert "there is no file 'gone.pdf' in the batch" in told
    assert '"processed_count": 5' in told
    assert '"status": "completed"' in told
    assert told.count("embedded done") == 5
    assert "\ninspection-note.txt\n" in told


def test_every_code_and_setting_that_it_names_is_one() -> None:
    text = (ROOT / "docs" / "batch-ingestion.md").read_text(encoding="utf-8")
    settings = set(re.findall(rf"`{ENV_PREFIX}([A-Z_]+)`", text))
    assert settings
    assert settings <= {name.upper() for name in Settings.model_fields}
    codes = {word for word in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", text) if not word.startswith(ENV_PREFIX)}
    assert codes - {"__MACOSX"} <= {code.value for code in ErrorCode}
