"""`ingest --metadata FILE` makes a batch, and `batch` shows it."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

from command_runs import Terminal

ROWS = 'filename,department,tags\nroof.md,Claims,"roof,storm"\nnobody.md,x,\nfaq.html,,\n'


def test_a_folder_with_a_mapping_is_a_batch(terminal: Terminal, files: Path, user: str) -> None:
    mapping = files / "metadata.csv"
    mapping.write_text(ROWS)
    ended = terminal("ingest", files, "--metadata", mapping, "--metadata", "year=2026", "--user", user, "--json")
    assert ended.status == 1
    lines = {Path(line["path"]).name: line for line in ended.lines()}
    assert set(lines) == {"roof.md", "note.txt", "faq.html", "photo.pdf", "nothing.txt"}
    (batch,) = {line["batch_id"] for line in lines.values()}
    assert [lines[name]["state"] for name in ("roof.md", "note.txt", "faq.html")] == ["done"] * 3
    assert [lines[name]["error"]["code"] for name in ("photo.pdf", "nothing.txt")] == ["TYPE_MISMATCH", "EMPTY_FILE"]

    shown = terminal("batch", batch, "--json").object()
    assert (shown["status"], shown["total"], shown["processed"], shown["failed"]) == ("partial_failure", 5, 3, 2)
    assert {failed["filename"] for failed in shown["failed_members"]} == {"photo.pdf", "nothing.txt"}
    assert shown["warnings"] == ["line 3 of the mapping: there is no file 'nobody.md' in the batch"]
    hit = terminal("search", "cracked shingles", "--user", user, "--limit", 1, "--json").object()["hits"][0]
    assert hit["metadata"] == {"department": "Claims", "tags": ["roof", "storm"], "year": "2026"}

    plain = terminal("batch", batch).out
    assert "partial_failure" in plain
    assert "5: 3 processed, 2 failed" in plain
    assert "nothing.txt" in plain


def test_a_batch_is_told_at_the_end_and_can_be_left_to_a_worker(terminal: Terminal, files: Path, user: str) -> None:
    mapping = files.parent / "metadata.json"
    mapping.write_text(json.dumps({"roof.md": {"author": "Ines"}}))
    ended = terminal("ingest", files / "roof.md", "--metadata", mapping, "--user", user, "--no-wait")
    assert ended.status == 0
    batch = ended.err.partition("This was batch ")[2].partition(";")[0]
    assert terminal("batch", batch, "--json").object()["status"] == "in_progress"


def test_what_is_no_batch_is_refused_by_name(terminal: Terminal, files: Path, user: str) -> None:
    mapping = files.parent / "metadata.csv"
    mapping.write_text("author\nInes\n")
    ended = terminal("ingest", files, "--metadata", mapping, "--user", user)
    assert ended.status == 1
    assert "INVALID_MAPPING" in ended.err
    assert "line 1" in ended.err
    mapping.write_text("filename\n")
    many = files.parent / "many"
    many.mkdir()
    for n in range(101):
        (many / f"{n}.txt").write_text(f"file {n} of {user}")
    ended = terminal("ingest", many, "--metadata", mapping, "--user", user)
    assert "BATCH_TOO_LARGE: The batch has 101 files" in ended.err
    assert terminal("documents", "--user", user, "--json").lines() == []
    assert terminal("ingest", files, "--metadata", "no-such-file.csv").status == 2
    assert terminal("ingest", files, "--metadata", mapping, "--metadata", mapping).status == 2
    missing = terminal("batch", uuid4())
    assert (missing.status, "BATCH_NOT_FOUND" in missing.err) == (1, True)
