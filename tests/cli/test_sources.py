from __future__ import annotations

import os
from pathlib import Path

from upload_pipeline.cli.sources import expand


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_folder_stands_for_its_top_level_without_hidden_files(files: Path) -> None:
    found = _names(expand([files], recursive=False))
    assert found == ["faq.html", "note.txt", "nothing.txt", "photo.pdf", "roof.md"]


def test_recursive_goes_below_but_not_into_hidden_folders(files: Path) -> None:
    (files / ".git").mkdir()
    (files / ".git" / "config.txt").write_text("x")
    found = _names(expand([files], recursive=True))
    assert "deep.txt" in found
    assert "config.txt" not in found


def test_a_named_path_is_taken_whatever_it_is(tmp_path: Path) -> None:
    hidden = tmp_path / ".hidden.txt"
    hidden.write_text("x")
    missing = tmp_path / "missing.txt"
    assert expand([hidden, missing], recursive=False) == [hidden, missing]


def test_each_file_comes_once_in_the_order_given(files: Path) -> None:
    found = expand([files / "roof.md", files, files / "below" / ".." / "roof.md"], recursive=False)
    assert _names(found)[0] == "roof.md"
    assert len(found) == len(set(_names(found))) == 5


def test_a_folder_that_links_to_itself_ends(files: Path) -> None:
    (files / "loop").symlink_to(files, target_is_directory=True)
    assert len(expand([files], recursive=True)) == 6


def test_pipes_in_folders_are_left_out(files: Path) -> None:
    os.mkfifo(files / "pipe.txt")
    assert "pipe.txt" not in _names(expand([files], recursive=False))
