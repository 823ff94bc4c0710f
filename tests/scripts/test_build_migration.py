from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "build-migration"


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    folder = tmp_path / "schema"
    folder.mkdir()
    (folder / "02_b.sql").write_bytes(b"select 2;\r\n\r\n")
    (folder / "01_a.sql").write_bytes("select 'é';\n".encode())
    (folder / "notes.md").write_text("not SQL")
    return folder


def run(schema: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    output = schema.parent / "made" / "1_initial.sql"
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--schema", str(schema), "--output", str(output), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def made(schema: Path) -> bytes:
    return (schema.parent / "made" / "1_initial.sql").read_bytes()


def test_joins_the_files_in_order_under_a_header(schema: Path) -> None:
    assert run(schema).returncode == 0

    header, rest = made(schema).decode().split("\n", 1)
    assert "Made by scripts/build-migration" in header
    assert rest == "\n-- sql/schema/01_a.sql\n\nselect 'é';\n\n-- sql/schema/02_b.sql\n\nselect 2;\n"


def test_same_files_make_the_same_bytes(schema: Path) -> None:
    run(schema)
    first = made(schema)
    run(schema)

    assert made(schema) == first


def test_check_tells_a_difference_and_writes_nothing(schema: Path) -> None:
    assert run(schema, "--check").returncode == 1
    assert not (schema.parent / "made").exists()

    run(schema)
    assert run(schema, "--check").returncode == 0

    (schema / "01_a.sql").write_text("select 3;\n")
    before = made(schema)
    failed = run(schema, "--check")
    assert (failed.returncode, made(schema)) == (1, before)
    assert "run scripts/build-migration" in failed.stderr


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "schema").mkdir()

    assert run(tmp_path / "schema").returncode == 1


def test_projects_migration_is_up_to_date() -> None:
    assert subprocess.run([sys.executable, str(SCRIPT), "--check"], check=False).returncode == 0
