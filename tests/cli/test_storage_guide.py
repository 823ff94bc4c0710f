"""What docs/storage.md says to do works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from postgres_servers import Database
from s3_servers import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server

from tests.simulators.azure_blob import ACCOUNT, KEY
from tests.simulators.simulator_process import running_simulator
from tests.simulators.supabase_wire import PUBLISHABLE_KEY
from upload_pipeline.settings import load_settings
from upload_pipeline.storage import s3_failures
from upload_pipeline.storage.store_setup import store_policies

GUIDE = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()


def blocks(language: str, section: str = "") -> list[str]:
    """The code blocks of a language, of the whole guide or of one section."""
    text = GUIDE.partition(f"## {section}\n")[2].partition("\n## ")[0] if section else GUIDE
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_its_commands_run_against_a_bucket(
    s3_server: S3Server, s3_bucket: str, database: Database, tmp_path: Path
) -> None:
    (commands,) = blocks("sh", "A bucket on S3")
    storage = doctors_word(commands, tmp_path, database, {"BUCKET": s3_bucket})
    assert storage.startswith("ok")
    assert f"s3://{s3_bucket}/upload-pipeline can be written; clients get URLs of the bucket" in storage
    assert "<Key>" not in s3_server.listing(s3_bucket)
    for process in ("api", "workers"):
        policy = json.loads((tmp_path / f"{process}-policy.json").read_text())
        assert s3_bucket in policy["Statement"][0]["Resource"]


def test_its_commands_run_against_supabase(database: Database, tmp_path: Path) -> None:
    (commands,) = blocks("sh", "A bucket of Supabase Storage")
    commands = commands.replace("supabase://", "supabase+http://")  # the simulator has no TLS
    with running_simulator("tests.simulators.supabase_storage", "--bucket", "files") as url:
        given = {
            "PROJECT": url.removeprefix("http://"),
            "BUCKET": "files",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            "AWS_REGION": REGION,
            "UPLOAD_PIPELINE_SUPABASE_PUBLISHABLE_KEY": PUBLISHABLE_KEY,
        }
        storage = doctors_word(commands, tmp_path, database, given)
        assert storage.startswith("ok")
        assert "/files/claims can be written; users with tokens get URLs of Supabase" in storage
        given["UPLOAD_PIPELINE_SUPABASE_PUBLISHABLE_KEY"] = "sb_publishable_other"
        storage = doctors_word(commands, tmp_path, database, given)
        assert storage.startswith("problem")
        assert "Set UPLOAD_PIPELINE_SUPABASE_PUBLISHABLE_KEY to the project's publishable key" in storage


@pytest.mark.slow
def test_its_commands_run_against_google(database: Database, tmp_path: Path) -> None:
    (commands,) = blocks("sh", "A bucket of Google Cloud Storage")
    file = tmp_path / "account.json"
    with running_simulator("tests.simulators.gcs", "--bucket", "files", "--key-file", str(file)) as url:
        given = {"BUCKET": "files", "GOOGLE_APPLICATION_CREDENTIALS": str(file), "GOOGLE_BASE_URL": url}
        storage = doctors_word(commands, tmp_path, database, given)
    assert storage.startswith("ok")
    assert "gs://files/claims can be written; clients get URLs of the bucket" in storage


@pytest.mark.slow
def test_its_commands_run_against_azure(database: Database, tmp_path: Path) -> None:
    (commands,) = blocks("sh", "A container of Azure Blob Storage")
    with running_simulator("tests.simulators.azure_blob", "--container", "files") as url:
        given = {
            "CONTAINER": "files",
            "AZURE_STORAGE_ENDPOINT": url,
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }
        storage = doctors_word(commands, tmp_path, database, given)
    assert storage.startswith("ok")
    assert "az://files/claims can be written; clients send bytes to URLs of the service" in storage


def doctors_word(commands: str, tmp_path: Path, database: Database, given: dict[str, str]) -> str:
    """What `doctor` says of the store, after the commands that end with it."""
    done = subprocess.run(
        ["/bin/bash", "-euc", commands],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "UPLOAD_PIPELINE_HOME": str(tmp_path / "home"),
            "UPLOAD_PIPELINE_DATABASE_URL": database.worker_url,
            **given,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.split()[1:2] == ["storage"]]
    assert len(lines) == 1, done.stdout + done.stderr
    assert (done.returncode == 0) is lines[0].startswith("ok"), done.stdout
    return lines[0]


def test_its_policy_is_the_printed_one_and_grants_what_a_refusal_asks_for() -> None:
    (policy,) = [json.loads(block) for block in blocks("json")]
    settings = load_settings(storage_url="s3://BUCKET/upload-pipeline".lower())
    printed = json.dumps(store_policies(settings)).replace(":::bucket", ":::BUCKET")
    assert policy == json.loads(printed)["api"]
    granted = {action for statement in policy["Statement"] for action in statement["Action"]}
    refusal = s3_failures.s3_refusal(OSError("<Code>AccessDenied</Code>"), "X")
    assert refusal is not None
    assert granted == set(re.findall(r"s3:\w+", refusal.remedy))
    codes = set(re.findall(r"`([A-Z][a-z]\w+)`", GUIDE.partition("## When it does not work")[2]))
    assert codes >= {"SignatureDoesNotMatch", "PermanentRedirect"}
    for code in codes:
        known = s3_failures.s3_refusal(OSError(f"<Code>{code}</Code>"), "X")
        assert known is not None
        assert "try again" not in known.remedy
