"""The real command in processes of its own, on one home with a running embedded database for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from command_runs import Terminal, clean_environment
from postgres_servers import FAST, temporary_home

from upload_pipeline.database.embedded import ensure_embedded


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A home whose database runs."""
    with temporary_home() as path:
        ensure_embedded(path, FAST)
        yield path


@pytest.fixture
def terminal(home: Path, tmp_path: Path) -> Terminal:
    """Commands on the common home, in a working directory without a `.env`."""
    return Terminal(clean_environment(home), tmp_path)


@pytest.fixture
def bare_terminal(tmp_path: Path) -> Terminal:
    """Commands that are not to reach any database: their home cannot be made."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the home's folder would be")
    return Terminal(clean_environment(blocked / "home"), tmp_path)


@pytest.fixture
def user() -> str:
    """A user of the test's own, who has no files yet."""
    return str(uuid4())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder: three good files, a bad and an empty one, a hidden one, one further down."""
    folder = tmp_path / "files"
    (folder / "below").mkdir(parents=True)
    stamp = uuid4()  # other bytes in each test, so that no document is known before
    (folder / "roof.md").write_text(f"# Roof\n\nThe shingles are cracked near the chimney.\n\n{stamp}\n")
    (folder / "note.txt").write_text(f"The basement was flooded after the storm.\n{stamp}\n")
    (folder / "faq.html").write_text(f"<h1>FAQ</h1><p>When do we pay for hail? Always.</p><p>{stamp}</p>")
    (folder / "photo.pdf").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (folder / "nothing.txt").write_bytes(b"")
    (folder / ".hidden.txt").write_text("not for anybody")
    (folder / "below" / "deep.txt").write_text(f"A sump pump stands in the cellar.\n{stamp}\n")
    return folder
