"""Files of this machine."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sample_documents import make_document

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_path
from upload_pipeline.intake.staging import Intake
from upload_pipeline.storage.keys import raw_key

CORPUS = Path(__file__).parents[2].parent / "shared" / "corpus"


async def take(intake, user, path):
    return await accept_path(intake, path=path, user_id=user, metadata={}, correlation_id="test")


async def refused(intake, user, path) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        await take(intake, user, path)
    return caught.value


@pytest.mark.parametrize("kind", ["pdf", "docx", "txt", "md", "html"])
async def test_a_file_becomes_a_document(intake, user, traces, tmp_path, kind):
    path = tmp_path / f"note.{kind}"
    path.write_bytes(make_document(kind, 1))
    accepted = await take(intake, user, path)
    key = raw_key(user, accepted.document_id)
    assert await traces.keys() == {key}
    assert await traces.store.get_bytes(key, 10**6) == path.read_bytes()
    again = await take(intake, user, path)
    assert again.duplicate
    assert again.job_id == accepted.job_id
    assert await traces.jobs() == 1


async def test_a_symbolic_link_is_followed(intake, user, tmp_path):
    (tmp_path / "target.bin").write_bytes(b"plain text")
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "target.bin")
    assert not (await take(intake, user, link)).duplicate


async def test_a_duplicate_whose_object_is_gone_brings_it_back(intake, user, traces, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain text")
    first = await take(intake, user, path)
    key = raw_key(user, first.document_id)
    await traces.store.delete([key])
    assert (await take(intake, user, path)).duplicate
    assert await traces.keys() == {key}


async def test_what_is_no_readable_file_is_refused_by_name(intake, user, traces, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.txt").symlink_to(tmp_path / "circle.txt")
    (tmp_path / "file.txt").write_text("text")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.txt"))
        expected = {
            tmp_path / "missing.txt": (ErrorCode.FILE_NOT_FOUND, "missing.txt"),
            tmp_path / "dangling.txt": (ErrorCode.FILE_NOT_FOUND, "dangling.txt"),
            tmp_path / "file.txt" / "below.txt": (ErrorCode.FILE_NOT_FOUND, "below.txt"),
            tmp_path / "nul\0.txt": (ErrorCode.FILE_NOT_FOUND, "nul"),
            tmp_path / "folder.txt": (ErrorCode.FILE_UNREADABLE, "a directory"),
            tmp_path / "pipe.txt": (ErrorCode.FILE_UNREADABLE, "a named pipe"),
            tmp_path / "socket.txt": (ErrorCode.FILE_UNREADABLE, "a socket"),
            tmp_path / "circle.txt": (ErrorCode.FILE_UNREADABLE, "circle.txt"),
            Path("/dev/zero"): (ErrorCode.FILE_UNREADABLE, "a device"),
        }
        for path, (code, named) in expected.items():
            error = await asyncio.wait_for(refused(intake, user, path), 10)
            assert error.code is code, path
            assert named in error.message
    assert await traces.nothing()


async def test_a_file_without_permission_is_refused(tmp_path):
    # In a process that is not root, to whom every file is open; it needs no database to be refused.
    path = tmp_path / "secret.txt"
    path.write_text("text")
    path.chmod(0)
    program = (
        "import asyncio, concurrent.futures.thread, os, sys, pathlib\n"
        "from upload_pipeline.intake.local_file import measure\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.parent.chmod(0o755)\n"
        "os.chdir(path.parent)\n"
        "if os.geteuid() == 0: os.setegid(65534); os.seteuid(65534)\n"
        "asyncio.run(measure(pathlib.Path(path.name), max_bytes=100))\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "FILE_UNREADABLE: 'secret.txt' cannot be read: Permission denied" in done.stderr


async def test_a_file_that_changes_while_it_is_read_is_refused(intake, user, traces, tmp_path):
    path = tmp_path / "log.txt"

    for after in (b"other text", b"some text and more", b"short"):
        path.write_bytes(b"first text")

        async def inspect(inspected: Path, _: str, after: bytes = after) -> None:
            inspected.write_bytes(after)

        changing = Intake(intake.db, intake.store, inspect, intake.max_bytes, intake.scratch)
        error = await refused(changing, user, path)
        assert error.code is ErrorCode.FILE_CHANGED
        assert "log.txt" in error.message
        assert error.retryable
        assert await traces.nothing()
    assert not (await take(intake, user, path)).duplicate


async def test_a_file_that_grows_without_end_meets_the_limit(intake, user, traces):
    # A regular file that is larger at each read than it says it is.
    error = await refused(
        Intake(intake.db, intake.store, intake.inspect, 1000, intake.scratch), user, Path("/proc/self/smaps")
    )
    assert error.code is ErrorCode.FILE_TOO_LARGE
    assert "1000" in error.message
    assert await traces.nothing()


@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus of real files is not on this machine")
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("encrypted.pdf", ErrorCode.ENCRYPTED),
        ("empty.pdf", ErrorCode.EMPTY_FILE),
        ("empty.txt", ErrorCode.EMPTY_FILE),
        ("text-named.pdf", ErrorCode.TYPE_MISMATCH),
        ("binary.txt", ErrorCode.TYPE_MISMATCH),
    ],
)
async def test_bad_files_of_the_corpus_are_refused_as_its_list_says(intake, user, traces, name, code):
    assert (await refused(intake, user, CORPUS / name)).code is code
    assert await traces.nothing()
