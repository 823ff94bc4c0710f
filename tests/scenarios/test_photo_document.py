"""docs/photos.md does what it says: its commands are run, against a service and a worker of their own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.scenarios.document_reader import ROOT, Reader, blocks
from upload_pipeline.errors import ErrorCode
from upload_pipeline.ids import LOCAL_USER_ID
from upload_pipeline.settings import ENV_PREFIX, Settings
from upload_pipeline.stages import PhotoStage, PhotoStatus

TEXT = (ROOT / "docs" / "photos.md").read_text(encoding="utf-8")


PAGE = """
import { readFile } from "node:fs/promises";
import { sendPhoto, followPhoto } from "./photos.mjs";

const token = async () => process.env.TOKEN;
const file = new File([await readFile("roof.jpg")], "roof.jpg", { type: "image/jpeg" });
const photo = await followPhoto(await sendPhoto(process.env.PROJECT, file, token), token);
console.log(JSON.stringify(photo));
"""


def roof() -> bytes:
    """A photo that tells where it was taken."""
    exif = Image.Exif()
    exif[0x010F] = "Canon"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)})
    buffer = BytesIO()
    Image.effect_noise((640, 480), 60).convert("RGB").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_the_commands_run_in_their_order(reader: Reader) -> None:
    for program in ("curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here")
    (reader.folder / "roof.jpg").write_bytes(roof())
    told = reader.run(["bash", "-euo", "pipefail", "-s"], "\n".join(blocks("photos.md", "sh")))
    assert "\nuploaded\n" in told
    photo = json.loads((reader.folder / "photo.json").read_text())
    assert (photo["status"], photo["width"], photo["height"]) == ("completed", 640, 480)
    assert [change["status"] for change in photo["status_history"]] == [
        "pending_upload",
        "uploaded",
        "processing",
        "completed",
    ]
    assert photo["exif_data"]["camera_make"] == "Canon"
    assert "gps" not in photo["exif_data"]
    assert "roof.jpg completed" in told
    with Image.open(reader.folder / "thumbnail.jpg") as thumbnail, Image.open(reader.folder / "fetched.jpg") as fetched:
        assert (thumbnail.size, fetched.size) == ((512, 384), (640, 480))
        assert not fetched.getexif().get_ifd(0x8825)
    job = re.search(r'"stage": "(\w+)",\s+"state": "(\w+)",\s+"progress": (\d+)', told)
    assert job is not None
    assert job.groups() == ("completed", "done", "100")


@pytest.fixture
def project(reader: Reader) -> str:
    """A project of the user whom the reader's token is for."""
    terminal = str(Path(sys.executable).parent / "upload-pipeline")
    reader.run([terminal, "organizations", "add", "Roofs Ltd", "--owner", str(LOCAL_USER_ID)])
    (reader.folder / "roof.jpg").write_bytes(roof())
    return reader.run([terminal, "projects", "add", "Roofs Ltd", "Elm Street 5"]).split()[-1]


def test_the_python_runs(reader: Reader, project: str) -> None:
    reader.environment["PROJECT"] = project
    told = reader.run([sys.executable, "-"], "\n".join(blocks("photos.md", "python")))
    assert told.split() == ["completed", "640", "480", "Canon"]


def test_the_javascript_runs(reader: Reader, project: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here")
    (reader.folder / "photos.mjs").write_text("\n".join(blocks("photos.md", "js")))
    (reader.folder / "page.mjs").write_text(PAGE)
    reader.environment["PROJECT"] = project
    photo = json.loads(reader.run([node, "page.mjs"]).splitlines()[-1])
    assert (photo["status"], photo["file_size"]) == ("completed", (reader.folder / "roof.jpg").stat().st_size)


def test_every_code_setting_stage_and_status_that_it_names_is_one() -> None:
    settings = set(re.findall(rf"`{ENV_PREFIX}([A-Z_]+)`", TEXT))
    assert settings
    assert settings <= {name.upper() for name in Settings.model_fields}
    codes = {word for word in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", TEXT) if not word.startswith(ENV_PREFIX)}
    assert codes
    assert codes <= {code.value for code in ErrorCode}
    for status in PhotoStatus:
        assert f"| `{status}` |" in TEXT
    for stage in PhotoStage:
        assert stage is PhotoStage.COMPLETED or f"| `{stage}` |" in TEXT or stage is PhotoStage.DETECTING
