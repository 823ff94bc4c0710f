"""Batches that come as a ZIP: ordinary ones, odd ones, and ones that were made to do harm."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_documents import make_document

from upload_pipeline.database.batches import BatchMember
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.archive import ArchiveLimits, add_archive, receive_archive
from upload_pipeline.intake.batch import BatchTerms, accept_batch, incoming_batch
from upload_pipeline.intake.staging import Intake, scratch_directory
from upload_pipeline.storage.keys import raw_key

LIMITS = ArchiveLimits(max_bytes=2_000_000, max_entries=150, max_ratio=100)


async def arriving(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 10_000):
        yield data[start : start + 10_000]


async def take(
    intake: Intake, user: UUID, data: bytes, limits: ArchiveLimits = LIMITS, mapping: bytes | None = None
) -> tuple[list[BatchMember], list[str]]:
    with scratch_directory(intake) as directory:
        async with incoming_batch(intake, user_id=user, correlation_id="c-1") as incoming:
            await receive_archive(intake, arriving(data), directory / "archive", limits)
            warnings = await add_archive(incoming, directory / "archive", limits)
            members = await accept_batch(incoming, uuid4(), BatchTerms(mapping, 10_000, warnings=warnings))
            return members, warnings


def zipped(*files: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return made.getvalue()


async def refused(intake: Intake, user: UUID, traces: Any, data: bytes, limits: ArchiveLimits = LIMITS) -> str:
    with pytest.raises(PipelineError) as caught:
        await take(intake, user, data, limits)
    assert caught.value.code is ErrorCode.INVALID_ARCHIVE
    assert await traces.nothing()
    assert not list(intake.scratch.glob("*"))
    return caught.value.message


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
async def test_the_files_of_an_archive_are_a_batch(intake, user, traces, method):
    kinds = ("pdf", "docx", "txt", "md", "html")
    files = [(f"folder {n}/../../sub\\{n}.{kind}", make_document(kind, n)) for n, kind in enumerate(kinds)]
    data = zipped(("folder 0/", b""), ("empty/", b""), *files, method=method)
    members, warnings = await take(intake, user, data, mapping=b"filename,author\nfolder 0/0.pdf,Ines\n")
    assert [(member.filename, member.error_code) for member in members] == [
        (f"{n}.{kind}", None) for n, kind in enumerate(kinds)
    ]
    assert warnings == []
    assert await traces.keys() == {raw_key(user, member.document_id) for member in members}
    author = await traces.db.fetchval(
        "select metadata ->> 'author' from upload_pipeline.documents where filename = '0.pdf'"
    )
    assert author == "Ines"
    assert not list(intake.scratch.glob("*"))


async def test_an_archive_that_was_written_to_a_pipe_is_read_too(intake, user):
    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, block: Any) -> int:
            self.data += bytes(block)
            return len(block)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        archive.writestr("a.txt", make_document("txt", 1))
    members, _ = await take(intake, user, pipe.data)
    assert [member.error_code for member in members] == [None]


async def test_names_twice_are_files_of_their_own_and_hidden_ones_are_left_out(intake, user):
    files = [("a/note.txt", b"one"), ("b/note.txt", b"two"), (".DS_Store", b"x"), ("__MACOSX/a/._note.txt", b"y")]
    members, warnings = await take(intake, user, zipped(*files))
    assert [(member.filename, member.error_code, member.duplicate) for member in members] == [
        ("note.txt", None, False)
    ] * 2
    assert warnings == ['hidden files of the archive were left out: ".DS_Store", "._note.txt"']


def entry(name: str, **fields: Any) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(made, field, value)
    return made


async def test_odd_entries_fail_alone(intake, user, traces):
    link = entry("link.txt", create_system=3, external_attr=(stat.S_IFLNK | 0o777) << 16)
    data = zipped(
        ("good.txt", b"plain words"),
        (link, b"/etc/passwd"),
        (entry("lzma.txt", compress_type=zipfile.ZIP_LZMA), b"words " * 100),
        ("large.txt", bytes(range(32, 127)) * 3000),
        ("empty.txt", b""),
        ("inner.zip", zipped(("x.txt", b"x"))),
        ("torn.txt", b"the bytes of this one are changed afterwards"),
        method=zipfile.ZIP_STORED,
    )
    data = data.replace(b"are changed afterwards", b"were another before!!!")
    members, _ = await take(intake, user, data)
    assert {member.filename: member.error_code for member in members} == {
        "good.txt": None,
        "link.txt": "UNSUPPORTED_TYPE",
        "lzma.txt": "UNSUPPORTED_TYPE",
        "large.txt": "FILE_TOO_LARGE",
        "empty.txt": "EMPTY_FILE",
        "inner.zip": "UNSUPPORTED_TYPE",
        "torn.txt": "CORRUPT_FILE",
    }
    assert await traces.keys() == {raw_key(user, members[0].document_id)}


async def test_an_encrypted_entry_fails_alone(intake, user):
    data = bytearray(zipped(("secret.txt", b"not really encrypted"), ("good.txt", b"plain words")))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    members, _ = await take(intake, user, bytes(data))
    assert [member.error_code for member in members] == ["ENCRYPTED", None]


async def test_a_bomb_is_refused_whole(intake, user, traces):
    sparse = zipped(("good.txt", b"plain words"), ("bomb.txt", b"0" * 1_900_000))
    assert len(sparse) < 10_000
    large = Intake(intake.db, intake.store, intake.inspect, 3_000_000, intake.scratch)
    assert "100 times" in await refused(large, user, traces, sparse)
    many = zipped(*((f"{n}.txt", bytes(range(32, 127)) * 2000 + b"%d" % n) for n in range(14)))
    assert "larger than 2000000 bytes in all" in await refused(intake, user, traces, many)


async def test_a_bomb_that_lies_about_its_size_ends_where_it_says(intake, user, traces):
    data = bytearray(zipped(("bomb.txt", b"0" * 1_900_000)))
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<L", 100)
    members, _ = await take(intake, user, bytes(data))
    assert [member.error_code for member in members] == ["CORRUPT_FILE"]
    assert await traces.keys() == set()


async def test_too_many_files_or_entries_are_refused(intake, user, traces):
    with pytest.raises(PipelineError) as caught:
        await take(intake, user, zipped(*((f"{n}.txt", b"%d" % n) for n in range(101))))
    assert caught.value.code is ErrorCode.BATCH_TOO_LARGE
    assert "101 files" in caught.value.message
    assert await traces.nothing()
    folders = zipped(*((f"{n}/", b"") for n in range(151)))
    assert "150 entries" in await refused(intake, user, traces, folders)
    at = folders.rindex(b"PK\x05\x06")
    lying = folders[: at + 8] + struct.pack("<2H", 1, 1) + folders[at + 12 :]
    assert "150 entries" in await refused(intake, user, traces, lying)
    vast = zipped(*(("x" * 60_000 + str(n), b"") for n in range(2)))
    assert "entries" in await refused(intake, user, traces, vast)


async def test_what_is_no_archive_or_not_a_whole_one_is_refused(intake, user, traces):
    good = zipped(("a.txt", make_document("txt", 1)), ("b.txt", make_document("txt", 2)))
    for data, said in (
        (b"", "no ZIP"),
        (b"plain words", "no ZIP"),
        (good[:-1], "no ZIP"),
        (good[: len(good) // 2], "no ZIP"),
        (good[1000:], "damaged"),
        (zipped(), "no files"),
        (zipped(("folder/", b""), (".hidden", b"x")), "no files"),
        (b"x" * (LIMITS.max_bytes + 1), "larger than"),
    ):
        assert said in await refused(intake, user, traces, data), data[:20]
    at = good.rindex(b"PK\x05\x06")
    zip64 = good[:at] + b"PK\x06\x07" + bytes(16) + good[at:]
    assert "ZIP64" in await refused(intake, user, traces, zip64)


@pytest.fixture
async def bare(intake: Intake) -> Intake:
    """An intake that opens every file at once."""

    async def inspect(_path: Path, _media_type: str) -> None:
        return None

    return Intake(intake.db, intake.store, inspect, 10_000, intake.scratch)


async def test_an_entry_without_a_name_is_a_file_without_a_name(bare, traces):
    archive = zipped(("x", b"plain words " * 20), ("b.md", b"# more\n" * 20))
    # the name in the central directory, whose length stands 28 bytes behind its mark, becomes the entry's comment
    at = archive.index(b"PK\x01\x02")
    unnamed = archive[: at + 28] + b"\0\0\0\0\1\0" + archive[at + 34 :]
    members, _ = await take(bare, uuid4(), unnamed)
    assert len(members) == 2


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6), cut=st.integers(0, 40))
async def test_whatever_an_archive_holds_it_is_read_or_refused_by_name(bare, traces, changes, cut):
    data = bytearray(zipped(("a.txt", b"plain words " * 20), ("b/c.md", b"# more\n" * 20), ("d.html", b"<p>x</p>" * 9)))
    for at, value in changes:
        data[at % len(data)] = value
    error = None
    try:
        members, _ = await take(bare, uuid4(), bytes(data[: len(data) - cut]))
    except PipelineError as caught:
        error = caught
    if error is None:
        assert members
    else:
        assert error.code in (ErrorCode.INVALID_ARCHIVE, ErrorCode.BATCH_TOO_LARGE)
    incoming = [key for key in await traces.keys() if key.startswith("incoming")]
    assert incoming == []
