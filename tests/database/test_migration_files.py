from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from upload_pipeline.database import migration_files
from upload_pipeline.database.migration_files import load_compat, load_migrations
from upload_pipeline.errors import ErrorCode, PipelineError

ROOT = Path(__file__).parents[2]


def test_finds_the_projects_migrations_in_a_checkout() -> None:
    on_disk = sorted(path.name for path in (ROOT / "supabase" / "migrations").glob("*.sql"))

    assert [migration.file_name for migration in load_migrations().migrations] == on_disk
    assert "auth.uid()" in load_compat()


def test_finds_them_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "7_packed.sql").write_text("select 7")
    (tmp_path / "compat").mkdir()
    (tmp_path / "compat" / "plain_postgres.sql").write_text("select 8")
    monkeypatch.setattr(migration_files, "_PACKAGED", tmp_path)

    assert [migration.name for migration in load_migrations().migrations] == ["packed"]
    assert load_compat() == "select 8"


def test_wheel_carries_them_where_the_package_looks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]

    assert included == {
        "supabase/migrations": "upload_pipeline/database/sql/migrations",
        "sql/compat": "upload_pipeline/database/sql/compat",
    }
    assert Path(migration_files.__file__).parent / "sql" == migration_files._PACKAGED


def test_order_is_that_of_the_versions_and_other_names_are_skipped(tmp_path: Path) -> None:
    for name in ("0002_b.sql", "0001_a_z.sql", "notes.md", "x_1.sql", "3.sql", "20261121000000_.sql"):
        (tmp_path / name).write_text(f"select '{name}'")
    (tmp_path / "4_folder.sql").mkdir()

    found = load_migrations(tmp_path)

    assert [(m.version, m.name) for m in found.migrations] == [("0001", "a_z"), ("0002", "b"), ("20261121000000", "")]
    assert found.migrations[0].sql == "select '0001_a_z.sql'"
    assert found.skipped == ("3.sql", "notes.md", "x_1.sql")


def test_two_files_of_one_version_are_named(tmp_path: Path) -> None:
    for name in ("1_a.sql", "1_b.sql"):
        (tmp_path / name).write_text("")

    with pytest.raises(PipelineError, match=r"1_a.sql and 1_b.sql"):
        load_migrations(tmp_path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["no folder", "not UTF-8"])
def test_folder_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "migrations"
    if content is not None:
        folder.mkdir()
        (folder / "1_a.sql").write_bytes(content)

    with pytest.raises(PipelineError, match="cannot be read") as caught:
        load_migrations(folder)
    assert caught.value.code is ErrorCode.MIGRATION_FAILED
    assert str(folder) in caught.value.message
