from __future__ import annotations

from pathlib import Path

import pytest

from upload_pipeline.cli.shown_settings import effective_settings
from upload_pipeline.settings import Settings
from upload_pipeline.url_secrets import without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@h:5432/d", "postgresql://u:***@h:5432/d"),
        ("postgresql://u:a@b@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u@h/d?password=hunter2&sslmode=require", "postgresql://u@h/d?password=***&sslmode=require"),
        ("s3://bucket?secret_access_key=hunter2", "s3://bucket?secret_access_key=***"),
        ("file:///data/store", "file:///data/store"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_effective_settings_have_every_setting_and_its_default(tmp_path: Path) -> None:
    rows = effective_settings(Settings(home=tmp_path, database_url="postgresql://u:hunter2@h/d", _env_file=None))
    values = {name: (value, given) for name, value, given in rows}
    assert len(values) == len(Settings.model_fields)
    assert values["UPLOAD_PIPELINE_DATABASE_URL"] == ("postgresql://u:***@h/d", True)
    assert values["UPLOAD_PIPELINE_STORAGE_URL"][0] == f"file://{tmp_path}/storage"
    assert values["UPLOAD_PIPELINE_WORKER_POOLS"] == (["default", "background"], False)
