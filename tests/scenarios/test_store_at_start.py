"""A store that cannot be written is found at the start by service and worker, which say the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMANDS = {
    "worker": [sys.executable, "-m", "upload_workers"],
    "service": [str(Path(sys.executable).parent / "upload-pipeline"), "serve"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_store_that_is_read_only_stops_the_start(command: list[str], database: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "storage").mkdir(parents=True)
    made = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")
    try:
        ended = subprocess.run(
            command,
            env={
                **os.environ,
                "UPLOAD_PIPELINE_HOME": str(tmp_path / "home"),
                "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url,
                "UPLOAD_PIPELINE_STORAGE_URL": f"file://{disk}",
                "UPLOAD_PIPELINE_API_PORT": "0",
                "UPLOAD_PIPELINE_JWT_SECRET": "a secret of this test, which is long enough",
                "UPLOAD_PIPELINE_JWT_ISSUER": "https://issuer.test/auth/v1",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        subprocess.run(["/bin/umount", str(disk)], check=True)
    assert ended.returncode == (1 if "upload_workers" in command else 2), ended.stdout + ended.stderr
    said = ended.stdout + ended.stderr
    assert "Traceback" not in said
    assert "STORAGE_DENIED" in said
    assert "UPLOAD_PIPELINE_STORAGE_URL" in said
