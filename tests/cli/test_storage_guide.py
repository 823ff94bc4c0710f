"""What docs/storage.md says to do works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from postgres_servers import Database
from s3_servers import S3Server

from upload_pipeline.storage import s3_failures

GUIDE = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def test_its_commands_run_against_a_bucket(
    s3_server: S3Server, s3_bucket: str, database: Database, tmp_path: Path
) -> None:
    (commands,) = blocks("sh")
    done = subprocess.run(
        ["/bin/bash", "-euc", commands],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "UPLOAD_PIPELINE_HOME": str(tmp_path / "home"),
            "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url,
            "BUCKET": s3_bucket,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (storage,) = [line for line in done.stdout.splitlines() if line.split()[1] == "storage"]
    assert storage.startswith("ok")
    assert f"s3://{s3_bucket}/upload-pipeline" in storage
    assert "<Key>" not in s3_server.listing(s3_bucket)


def test_its_documents_are_json_and_grant_what_a_refusal_asks_for() -> None:
    policy, *others = [json.loads(block) for block in blocks("json")]
    assert len(others) == 2
    actions = [statement["Action"] for statement in policy["Statement"]]
    granted = {actions[0], *actions[1]}
    refusal = s3_failures.s3_refusal(OSError("<Code>AccessDenied</Code>"), "X")
    assert refusal is not None
    assert granted == set(re.findall(r"s3:\w+", refusal.remedy))
    codes = set(re.findall(r"`([A-Z][a-z]\w+)`", GUIDE.partition("## When it does not work")[2]))
    assert codes >= {"SignatureDoesNotMatch", "PermanentRedirect"}
    for code in codes:
        known = s3_failures.s3_refusal(OSError(f"<Code>{code}</Code>"), "X")
        assert known is not None
        assert "try again" not in known.remedy
