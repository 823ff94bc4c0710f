"""The live tests pass against the simulators, and say what they lack where they have no keys: so they cannot rot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from s3_servers import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server

from tests.simulators.azure_blob import ACCOUNT, KEY
from tests.simulators.simulator_process import ROOT, running_simulator
from tests.simulators.supabase_storage import SupabaseStorage
from tests.simulators.supabase_wire import PUBLISHABLE_KEY

LIVE = sorted(path for path in Path(__file__).parent.glob("test_*_live.py"))
COUNT = 7


def live_tests(variables: dict[str, str], folder: Path) -> str:
    """What pytest says of them, in a process that has these keys and no others."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "LIVE_", "OPENAI_", "LLAMA_CLOUD_", "UPLOAD_PIPELINE_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--basetemp", str(folder), *map(str, LIVE)],
        cwd=ROOT,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_with_keys_they_pass(s3_server: S3Server, tmp_path: Path) -> None:
    bucket = f"live-{uuid4()}"
    s3_server.make_bucket(bucket)
    account = tmp_path / "account.json"
    keys = {"ACCESS_KEY_ID": ACCESS_KEY_ID, "SECRET_ACCESS_KEY": SECRET_ACCESS_KEY, "REGION": REGION}
    with (
        running_simulator("tests.simulators.supabase_storage", "--bucket", "files") as supabase,
        running_simulator("tests.simulators.gcs", "--bucket", "files", "--key-file", str(account)) as google,
        running_simulator("tests.simulators.azure_blob", "--container", "files") as azure,
        running_simulator("tests.simulators.openai_embeddings") as openai,
        running_simulator("tests.simulators.llama_cloud", "--running", "0") as llama,
    ):
        variables = {
            **{f"LIVE_S3_{name}": value for name, value in keys.items()},
            "LIVE_S3_URL": f"s3://{bucket}",
            "LIVE_S3_ENDPOINT_URL": s3_server.endpoint,
            **{f"LIVE_SUPABASE_{name}": value for name, value in keys.items()},
            "LIVE_SUPABASE_URL": f"supabase+{supabase}/files",
            "LIVE_SUPABASE_PUBLISHABLE_KEY": PUBLISHABLE_KEY,
            "LIVE_SUPABASE_USER_TOKEN": SupabaseStorage().token(str(uuid4())),
            "LIVE_GOOGLE_URL": "gs://files",
            "LIVE_GOOGLE_APPLICATION_CREDENTIALS": str(account),
            "LIVE_GOOGLE_BASE_URL": google,
            "LIVE_AZURE_URL": "az://files",
            "LIVE_AZURE_ACCOUNT_NAME": ACCOUNT,
            "LIVE_AZURE_ACCOUNT_KEY": KEY,
            "LIVE_AZURE_ENDPOINT": azure,
            "OPENAI_API_KEY": "sk-simulated",
            "OPENAI_BASE_URL": openai if openai.endswith("/v1") else f"{openai}/v1",
            "LLAMA_CLOUD_API_KEY": "llx-simulated",
            "LLAMA_CLOUD_BASE_URL": llama,
        }
        told = live_tests(variables, tmp_path / "live")
    assert re.search(rf"\b{COUNT} passed", told), told
    assert "skipped" not in told
    assert "<Key>" not in s3_server.listing(bucket)  # they clean up after themselves


def test_the_guide_names_what_they_read() -> None:
    guide = (ROOT / "docs" / "providers.md").read_text()
    assert "scripts/test -rs tests/live\n" in guide
    read = "".join(path.read_text() for path in [*LIVE, LIVE[0].with_name("live_keys.py")])
    named = set(re.findall(r"\b(?:LIVE|OPENAI|LLAMA_CLOUD)_[A-Z0-9_]+", guide.partition("## Live tests")[2]))
    names = re.findall(r'"([A-Z_]+)"', read)
    stores = {f"LIVE_{store}_{name}" for store in ("S3", "SUPABASE", "GOOGLE", "AZURE") for name in names}
    assert named <= set(re.findall(r'"([A-Z0-9_]+)"', read)) | stores


def test_without_keys_they_are_skipped_and_say_so(tmp_path: Path) -> None:
    told = live_tests({}, tmp_path / "live")
    assert re.search(rf"\b{COUNT} skipped", told), told
    assert "passed" not in told
    stores = ("LIVE_S3_URL", "LIVE_SUPABASE_URL", "LIVE_GOOGLE_URL", "LIVE_AZURE_URL")
    for name in (*stores, "OPENAI_API_KEY", "LLAMA_CLOUD_API_KEY"):
        assert name in told
